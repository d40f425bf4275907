"""The command line of the experiments: solvers and adjoints as options, commands by name, errors in one line."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

import deq_jax as deq

SOLVERS_AND_ADJOINTS = (
    deq.Picard,
    deq.Anderson,
    deq.Broyden,
    deq.NewtonKrylov,
    deq.Implicit,
    deq.ImplicitJVP,
    deq.Phantom,
    deq.Neumann,
    deq.JFB,
    deq.Shine,
    deq.Reversible,
    deq.Unroll,
)


# The command line.

# The tolerances a command line starts from when it names another solver: those of `char_lm`'s defaults.
FORWARD: dict[str, Any] = dict(rtol=1e-2, max_steps=16)
BACKWARD: dict[str, Any] = dict(rtol=1e-2, max_steps=16)


SolverOption = (
    Annotated[deq.Picard, tyro.conf.subcommand("picard", default=deq.Picard(**FORWARD))]
    | Annotated[deq.Anderson, tyro.conf.subcommand("anderson", default=deq.Anderson(**FORWARD))]
    | Annotated[deq.Broyden, tyro.conf.subcommand("broyden", default=deq.Broyden(**FORWARD))]
    | Annotated[deq.NewtonKrylov, tyro.conf.subcommand("newton-krylov", default=deq.NewtonKrylov(**FORWARD))]
)
NONE: Any = None


BackwardOption: Any = (
    Annotated[deq.Picard, tyro.conf.subcommand("picard", default=deq.Picard(**BACKWARD))]
    | Annotated[deq.Anderson, tyro.conf.subcommand("anderson", default=deq.Anderson(**BACKWARD))]
    | Annotated[deq.Broyden, tyro.conf.subcommand("broyden", default=deq.Broyden(**BACKWARD))]
    | Annotated[deq.NewtonKrylov, tyro.conf.subcommand("newton-krylov", default=deq.NewtonKrylov(**BACKWARD))]
    | NONE
)


AdjointOption = (
    deq.Implicit | deq.ImplicitJVP | deq.Phantom | deq.Neumann | deq.JFB | deq.Shine | deq.Reversible | deq.Unroll
)
OPTIONS = tyro.constructors.ConstructorRegistry()


@OPTIONS.struct_rule
def _implicit(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    # The core cannot name the solvers in an annotation for a command line's sake; here they are.
    cls: Any = info.type
    if cls not in (deq.Implicit, deq.ImplicitJVP):
        return None
    given = info.default if isinstance(info.default, cls) else cls(deq.Anderson(**BACKWARD))
    types = {"solver": BackwardOption, "on_failure": deq.OnFailure}
    texts = {"solver": "of the backward equilibrium", "on_failure": "the gradient of a problem that failed"}
    options = [
        tyro.constructors.StructFieldSpec(name=n, type=types[n], default=getattr(given, n), helptext=texts[n])
        for n in types
    ]
    return tyro.constructors.StructConstructorSpec(instantiate=cls, fields=tuple(options))


def run_command(
    commands: dict[str, Callable],
    args: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    default: str | None = None,
) -> None:
    """Call the command that the first word names, or `default`, with the options after it.

    It leaves with one line where something about the command, its files or its run is wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in commands:
        name = args.pop(0)
    elif default is not None and args[:1] not in (["-h"], ["--help"]):
        name = default
    else:  # the list of commands
        return tyro.extras.subcommand_cli_from_dict(commands, args=args, prog=prog, description=description)
    try:
        with OPTIONS:
            # This command's own parser: what it suggests for a misspelled option is an option of this command.
            tyro.cli(commands[name], args=args, prog=f"{prog} {name}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        # While data are read or results measured: nothing is lost. In the training loop it is a flag.
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # XLA's own
            raise
        raise SystemExit(f"error: {error}") from error


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """ValueError that names the option unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {got}")
