"""Compare two runs' checkpoints, tensor by tensor: weights, averages, optimizer.

    python tests/compare.py runs/a runs/b        # their last.pt; or two files of one kind

Says how many tensors differ by at least a bit, which of the network's differs most (the norm of the
difference as a share of the tensor's norm), how far all of these, laid end to end, are apart, and
whether that is rounding. The exit code is 1 if any tensor differs. In float32, rounding drives runs
of another number of processes or threads apart, the more the longer they are: compare these with
--double, where the weights of some steps are less than 1e-9 of their norm apart.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model import load_file


def tensors(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested checkpoint, by its path."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = {}
    for key, value in items:
        if torch.is_tensor(value):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, (dict, list)):
            found |= tensors(value, f"{prefix}{key}/")
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of a - b as a share of b's norm."""
    a, b = a.double(), b.double()
    return (a - b).norm().item() / max(b.norm().item(), 1e-30)


def report(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[str, bool]:
    """What to say of two checkpoints' tensors, and whether all are equal."""
    alone = a.keys() ^ b.keys() | {n for n in a.keys() & b.keys() if a[n].shape != b[n].shape}
    if alone:
        return f"{len(alone)} tensors are not in both, or of two shapes: {min(alone)} ...", False
    wrong = [name for name in a if not torch.equal(a[name], b[name])]
    text = f"{len(a):,} tensors, {len(wrong):,} differ"
    if wrong:
        text += f", like {wrong[0]}"
        weights = [n for n in a if n.startswith("model/") and a[n].is_floating_point()]
        worst = max(weights, key=lambda name: apart(a[name], b[name]))
        both = [torch.cat([state[n].flatten() for n in weights]) for state in (a, b)]
        all_apart = apart(*both)
        text += (f"; of the weights most {worst}, by {apart(a[worst], b[worst]):.2g} of its norm, "
                 f"and all by {all_apart:.2g}: ")
        text += ("equal but for rounding" if all_apart < 1e-9 else
                 "more than rounding does in a few steps" if both[0].dtype == torch.float64 else
                 "in float32 rounding alone can do that; to be sure, compare runs with --double")
    return text, not wrong


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    paths = [path / "last.pt" if path.is_dir() else path for path in map(Path, sys.argv[1:])]
    try:
        text, equal = report(*(tensors(load_file(str(path))) for path in paths))
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: {error}")
    print(text)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
