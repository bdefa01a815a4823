"""`trl-ext plugins`: list the names that a config can use and the module or distribution of each.

Listing imports our registries (and with them torch), but neither trl nor a plugin. `--check` also imports the plugins
and shows the properties that each callable declares.
"""

import argparse
import importlib
import sys
from collections import Counter
from dataclasses import asdict

from trl_ext.registry import Registry, all_registries


BUILT_IN = (  # the modules that define a registry
    "trl_ext.losses.ranking",
    "trl_ext.losses.token",
    "trl_ext.data.segmentation",
    "trl_ext.scoring.aggregation",
    "trl_ext.scoring.reducers",
    "trl_ext.pipelines.rejection_sampling.selection",
)


def make_parser(prog: str | None = "trl-ext plugins") -> argparse.ArgumentParser:
    """The parser of the one switch, `--check`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="List the names that a config can use, built in or from plugins, and where each comes from.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also import every plugin and show its properties; the exit status is 1 if one cannot be used",
    )
    return parser


def _check(registry: Registry, name: str) -> tuple[str, str | None]:
    """Return the properties of a callable as text, and the error that prevents its use, or `None`."""
    try:
        properties = registry.properties_of(name)
    except (ValueError, TypeError, ImportError) as error:
        return "", str(error)
    named = {} if properties is None else asdict(properties)
    return ", ".join(f"{key}={value!r}" for key, value in named.items()), None


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    args = make_parser().parse_args(argv)
    for module in BUILT_IN:
        importlib.import_module(module)
    problems = []
    for registry in all_registries():
        entries = registry.available()
        print(f"{registry.kind} (entry-point group '{registry.group}')")
        width = max((len(name) for name, _ in entries), default=0)
        claims = Counter(name for name, _ in entries)
        for name, origin in entries:
            conflict = "  CONFLICT: this name cannot be used" if claims[name] > 1 else ""
            print(f"  {name:<{width}}  {origin}{conflict}")
            if args.check:
                properties, problem = _check(registry, name)
                if properties:
                    print(f"  {'':<{width}}    {properties}")
                if problem is not None and problem not in problems:
                    problems.append(problem)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["plugins", *sys.argv[1:]]))
