"""Trains the embedded models, one command each, on CPU (bfloat16 autocast) or CUDA. Every command resumes where it stopped.

python -m attnctrl.icons.train text      --output runs/icons
python -m attnctrl.icons.train vae       --output runs/icons
python -m attnctrl.icons.train denoiser  --output runs/icons
python -m attnctrl.icons.train export    --output runs/icons --to assets/icons-t2i

python -m attnctrl.icons.train clip         --output runs/icons
python -m attnctrl.icons.train export-clip  --output runs/icons --to assets/open_clip/icons-clip

python -m attnctrl.icons.train vlm          --output runs/icons
python -m attnctrl.icons.train export-vlm   --output runs/icons --to assets/models/icons-vlm

python -m attnctrl.icons.train smol-vlm         --output runs/smol --emoji FOLDER
python -m attnctrl.icons.train export-smol-vlm  --output runs/smol --to assets/models/smol-vlm
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from .._quiet import quiet_imports
from ..errors import AttnCtrlError


def _add(parser: argparse.ArgumentParser, function, skip: tuple[str, ...]) -> None:
    """One option per keyword argument of a recipe, with its default."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip or parameter.default is inspect.Parameter.empty:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(parameter.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=parameter.default)
        else:
            kind = type(parameter.default) if parameter.default is not None else str
            parser.add_argument(flag, type=kind, default=parameter.default, help=f"default {parameter.default}")


def main(argv: list[str] | None = None) -> None:
    with quiet_imports():
        from .recipes import clip, denoiser, export, smol_export, smol_vlm, text, vae, vlm

    recipes = {
        "text": text.train,
        "vae": vae.train,
        "denoiser": denoiser.train,
        "export": export.export,
        "clip": clip.train,
        "export-clip": clip.export,
        "vlm": vlm.train,
        "export-vlm": vlm.export,
        "smol-vlm": smol_vlm.train,
        "export-smol-vlm": smol_export.export,
    }
    parser = argparse.ArgumentParser(
        prog="python -m attnctrl.icons.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="recipe", required=True)
    for name, function in recipes.items():
        sub = commands.add_parser(name, help=(inspect.getdoc(function) or "").splitlines()[0])
        sub.add_argument(
            "--output", type=Path, required=True, help="folder of the run: checkpoints, sample grids, finished parts"
        )
        if name.startswith("export"):
            sub.add_argument("--to", type=Path, required=True, help="folder for the finished model, half precision")
        _add(sub, function, skip=("output", "parts", "to"))
    options = vars(parser.parse_args(argv))
    function = recipes[options.pop("recipe")]
    if "parts" in inspect.signature(function).parameters:
        options["parts"] = options["output"]
    try:
        function(**options)
    except AttnCtrlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
