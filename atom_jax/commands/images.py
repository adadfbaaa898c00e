"""The command that looks at images: tokens."""

from __future__ import annotations

from absl import flags

from atom_jax.commands.flags import Flags, check_writable
from atom_jax.typing import AtomError


def tokens(argv: list[str]) -> None:
    """Makes tokens of images, as many as each needs. argv: the command and its arguments. Raises AtomError for bad
    input."""
    known = Flags("tokens --checkpoint=PATH --image=FILE", "Codes of images, as many as each of them needs.")
    known.add(flags.DEFINE_string, "checkpoint", None, "a tokenizer of images (configs/image.py)")
    known.add(flags.DEFINE_multi_string, "image", [], "an image file, square; may be repeated")
    known.add(flags.DEFINE_float, "error", None, "the fewest tokens with at most this mean squared error")
    known.add(
        flags.DEFINE_integer, "tokens", None, "instead: so many tokens of each image, or the next fewer on offer"
    )
    known.add(flags.DEFINE_string, "allocate", "same", "same, or gain (a mean, to where it helps most)", "tokens")
    known.add(flags.DEFINE_string, "save", None, "an .npz file for the codes")
    known.add(flags.DEFINE_string, "out", None, "a PNG to draw the images with 1, 2, 4 ... tokens in")
    values, _ = known.parse(argv, 0, "checkpoint", "image")
    if (values.error is None) == (values.tokens is None):
        raise AtomError("give --error or --tokens" if values.error is None else "give --error or --tokens, not both")
    if values.allocate not in ("same", "gain"):
        raise AtomError(f"--allocate={values.allocate}: expected same or gain")
    if values.save is not None and not values.save.endswith(".npz"):
        raise AtomError(f"--save={values.save}: the name must end in .npz")
    check_writable("--save", values.save)

    import numpy as np

    from atom_jax import picture
    from atom_jax.checkpoint import load
    from atom_jax.data import images
    from atom_jax.evaluation import image_strip
    from atom_jax.evaluation.metrics import columns
    from atom_jax.inference import image_tokens as lib

    picture.check(values.out)
    lm = load(values.checkpoint)
    lib.check(lm, f"--checkpoint={values.checkpoint}")
    codes = lm.config.quantiser.codes
    if values.save is not None and not codes:
        raise AtomError(f"--save={values.save}: this tokenizer has no codes")
    pixels = np.stack([images.read(path, lm.config.size, lm.config.channels) for path in values.image])
    found = lib.offers(lm, pixels)
    if values.error is not None:
        best = found.errors.min(axis=0)
        worst = int(best.argmax())
        if not best[worst] <= values.error:
            name = values.image[worst]
            raise AtomError(f"--error={values.error:g} is out of reach: the best for {name} is {best[worst]:.4g}")
        at = lib.within(found, values.error)
    else:
        at = (lib.by_gain if values.allocate == "gain" else lib.at_most)(found, values.tokens)
    used, errors = lib.tokens_of(found, at), lib.errors_of(found, at)
    if values.save is not None:
        lib.save(values.save, found.codes[at, np.arange(len(at))], values.image)
    if values.out is not None:
        image_strip.draw(pixels, found, at, values.out)
    bits = np.log2(codes) if codes else np.nan
    rows = [(name, str(k), f"{k * bits:.0f}", f"{e:.5f}") for name, k, e in zip(values.image, used, errors)]
    print(columns([("image", "tokens", "bits", "squared error"), *rows], 1))
