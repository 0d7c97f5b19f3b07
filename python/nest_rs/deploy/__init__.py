"""Put a patch on a deployed model, take it off to the bit, and tell whether it is there.

One road for every form (`nest_rs.checkpoints`): the rows are found and compared with what the patch's base must hold
(`target`), computed (`changing`), and written under a journal (`writing`), so that a crash at any moment leaves the old
rows, the new ones, or a journal which the next command completes. The model is never loaded; memory is that of the
touched rows.

Beside a target lies its state, `.nest-rs/` in a folder or `.<name>.nest-rs/` beside a file: one undo record a patch
that is on (`records`), with the bytes before and after (layout: `src/fold/journal.rs`).
"""

from nest_rs.deploy.changing import Applied, apply, remove
from nest_rs.deploy.inspection import applied_patches, describe, is_patch
from nest_rs.deploy.sealing import seal
from nest_rs.deploy.verifying import Verdict, verify

__all__ = ["Applied", "Verdict", "applied_patches", "apply", "describe", "is_patch", "remove", "seal", "verify"]
