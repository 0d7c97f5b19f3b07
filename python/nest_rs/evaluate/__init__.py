"""Ask a model, judge the answers, and give every rate with its number and interval."""
