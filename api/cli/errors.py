"""Errors of the service's own commands.

Owns the messages for a missing extra, invalid settings and unreachable servers. Invariant: each is one sentence that
names what to install or set.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from grpo_client.cli.output import EXIT_REFUSED, CommandError

OURS = ("api", "jobs", "grpo_core", "grpo_client", "deploy")


@contextmanager
def needs_extra(extra: str) -> Generator[None]:
    """Report a missing extra when one of its packages cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in OURS:
            raise
        raise CommandError(
            f"This command needs {error.name}, which is not installed. In a checkout of the repository: "
            f"pip install ./grpo_client '.[{extra}]'.",
            EXIT_REFUSED,
        ) from error


@contextmanager
def service_errors(extra: str) -> Generator[None]:
    """Report in one sentence what the environment of a service command lacks."""
    with needs_extra(extra):
        from pydantic import ValidationError

        from grpo_core.errors import JobFailure
        from jobs.errors import JobsError, Misconfigured, Unavailable
    try:
        with needs_extra(extra):
            yield
    except Misconfigured as error:
        raise CommandError(str(error), EXIT_REFUSED) from error
    except JobsError as error:
        hint = " Check that S3_ENDPOINT, S3_BUCKET, the AWS_ keys and REDIS_URL name the running servers."
        raise CommandError(f"{error}{hint if isinstance(error, Unavailable) else ''}") from error
    except JobFailure as error:
        raise CommandError(f"{error.report.message} {error.report.hint}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise CommandError(f"The environment has invalid settings: {wrong}.", EXIT_REFUSED) from error
