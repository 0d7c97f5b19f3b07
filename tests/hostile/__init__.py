"""Patches and targets made to do harm: each is refused with one clear line, and no byte is written."""
