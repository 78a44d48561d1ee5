"""The options of ``unstir loadtest``, and the order of its measurements."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from app.cli.flags import flags_of, read, with_flags
from app.cli.loadtest import load, report
from app.cli.loadtest.load import Client, LoadError, Run, Target
from app.cli.mix import MIX, Mix, MixText, poisson
from app.cli.terminal import CommandError, explain, fault, print_status

CLIENTS_AT_CAPACITY = 16
DEFAULT_LOAD = 0.6


def _json_object(text: str) -> str:
    if not isinstance(json.loads(text), dict):
        raise ValueError("a JSON object is needed")  # noqa: TRY004 - pydantic reports these
    return text


def _in_a_folder(path: Path) -> Path:
    if not path.absolute().parent.is_dir():
        raise ValueError("no such folder")
    return path


class LoadtestOptions(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    url: str = Field("http://127.0.0.1:8000/sample", description="Where to send requests.")
    mix: MixText = Field(MIX, description="Step counts, and the share of requests with each.")
    rate: float | None = Field(None, gt=0, description="Requests a second, at Poisson arrivals.")
    load: float | None = Field(
        None,
        gt=0,
        description=f"Instead, a fraction of the capacity, which is measured first; by default {DEFAULT_LOAD}.",
    )
    clients: int | None = Field(
        None, ge=1, description="Instead, so many clients, each with the next request once the last is answered."
    )
    seconds: float = Field(30, gt=0, description="How long requests are sent.")
    seed: int = Field(1, description="Of the arrivals and of the mix.")
    accept: str = Field("application/x-npy", description="Media type of the answers.")
    body: Annotated[str, AfterValidator(_json_object)] = Field(
        '{"sampler": "ddim"}', description="More fields of each request, as JSON."
    )
    field: str = Field("steps", description="The field that holds the number of steps.")
    plot: Annotated[Path, AfterValidator(_in_a_folder)] | None = Field(
        None, description="PNG to write: the share of requests answered by each time."
    )
    retry: bool = Field(False, description="Retry a refused request once, after Retry-After.")

    @model_validator(mode="after")
    def _one_kind_of_load(self) -> Self:
        if sum(kind is not None for kind in (self.rate, self.load, self.clients)) > 1:
            raise ValueError("give one of --rate, --load and --clients")
        return self


@with_flags(flags_of(LoadtestOptions))
def loadtest(**flags: Any) -> int:
    """Measure, and print a table and one line of JSON."""
    options = read(LoadtestOptions, flags)
    extra = json.loads(options.body)
    target = Target(options.url, lambda steps, seed: {options.field: steps, "seed": seed, **extra}, options.accept)
    with explain(LoadError):
        facts, result, alone = asyncio.run(_measure(options, Mix.parse(options.mix), target))
    summary = report.summarize(result.records, result.seconds, alone)
    print(report.table(summary))
    if options.plot:
        _plot(options.plot, result, facts)
    print(json.dumps({**facts, **summary}))
    return 0


async def _measure(options: LoadtestOptions, mix: Mix, target: Target) -> tuple[dict[str, Any], Run, dict[int, float]]:
    """What was done, its records, and seconds of each class alone."""
    facts: dict[str, Any] = {"url": target.url, "mix": str(mix), "seed": options.seed}
    async with load.connected(target) as client:
        print_status("alone")
        alone = await load.alone(client, mix.steps)
        if options.clients:
            facts["clients"] = options.clients
            print_status(f"{options.clients} clients for {options.seconds:g} s")
            result = await load.closed_loop(
                client, mix, options.clients, options.seconds, options.seed, retry=options.retry
            )
            return facts, result, alone
        rate = options.rate
        if not rate:
            facts["load"] = options.load or DEFAULT_LOAD
            facts["capacity"] = await _capacity(client, mix, max(5.0, options.seconds / 3), options.seed)
            rate = facts["load"] * facts["capacity"]
        facts["rate"] = rate
        arrivals = poisson(mix, rate, options.seconds, options.seed)
        if not arrivals:
            raise CommandError(
                fault("--seconds", options.seconds, f"no request arrives at {rate:.3g} a second; take more")
            )
        print_status(f"{len(arrivals)} requests in {options.seconds:g} s, {rate:.3g} a second on average")
        return facts, await load.open_loop(client, arrivals, retry=options.retry), alone


async def _capacity(client: Client, mix: Mix, seconds: float, seed: int) -> float:
    """Requests a second of the saturated server."""
    print_status(f"capacity: {CLIENTS_AT_CAPACITY} clients for {seconds:g} s")
    busy = await load.closed_loop(client, mix, CLIENTS_AT_CAPACITY, seconds, seed, retry=True)
    # In steps rather than requests: a few long requests more or less would otherwise decide.
    done = sum(record.steps for record in busy.records if record.ok)
    if not done:
        raise LoadError(
            f"{client.target.url} answered none of {len(busy.records)} requests of {CLIENTS_AT_CAPACITY} clients"
        )
    return done / busy.seconds / mix.mean


def _plot(path: Path, result: Run, facts: dict[str, Any]) -> None:
    from app.cli.loadtest import plots  # noqa: PLC0415 - matplotlib may be missing

    title = f"{facts['clients']} clients" if "clients" in facts else f"{facts['rate']:.3g} requests/s"
    try:
        plots.latencies(path, result.records, title)
    except ImportError:
        raise CommandError("--plot needs matplotlib: pip install matplotlib") from None
    except (OSError, ValueError) as error:
        raise CommandError(fault("--plot", path, str(error))) from error
