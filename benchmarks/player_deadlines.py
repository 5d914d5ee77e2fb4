"""What it buys to serve first whose listeners would hear silence soonest, on a saturated engine.

Two engines over one random checkpoint, without and with ``--player-deadlines``, take turns. Each
serves listeners, who play a reply as it comes and ask for the next when they have heard it, and
other clients, who take complete files and ask for the next at once. With ``--turns-alone`` both
engines order the codec by deadlines, and only the rows' turns in decode steps are off or on.

    python -m benchmarks.player_deadlines --size tiny --codec full --listeners 4 --others 28
    python -m benchmarks.player_deadlines --size medium --codec tiny --num-rounds 3 --json out.json
    python -m benchmarks.player_deadlines --size medium --codec tiny --turns-alone
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks._engine import make_core, make_request
from benchmarks._report import format_table, write_json
from vllm.benchmarks.figures import percentiles
from vllm.checkpoints.make_codec import CODEC_SIZES, make_codec
from vllm.checkpoints.make_model import SIZES, make_model
from vllm.player import Listener, VirtualPlayer
from vllm.v1.core.row_turns import RowTurns
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreOutput, EngineCoreRequest, EngineInfo
from vllm.v1.request import Request

BYTES_PER_SAMPLE = 4
PROMPT_LENS = (40, 120)
MAX_FIRST_PAUSE_S = 1.0  # listeners do not all begin at once
POLICIES = {"off": False, "on": True}
FIGURES = {
    "num_underruns": "underruns",
    "stalled_s": "stalled s",
    "silent_s": "waiting and stalled s",
    "first_audio_p50_s": "first audio P50 s",
    "first_audio_p95_s": "P95 s",
    "heard_s_per_s": "heard s/s",
    "others_s_per_s": "others s/s",
    "audio_s_per_s": "all s/s",
    "others_longest_s": "others' longest s",
}


class NoTurns(RowTurns):
    """Every row is in every step."""

    def choose(self, running: Collection[Request], now: float) -> None:
        """None, which stands for all of them."""


@dataclass(frozen=True)
class Settings:
    """Who asks for what, and for how long."""

    num_listeners: int
    num_others: int
    num_frames: tuple[int, int]  # of one reply, drawn uniformly
    seconds: float


@dataclass(eq=False)
class Client:
    """Asks for one reply after the other."""

    name: str
    rng: random.Random
    listens: bool
    due: float  # when the next request is sent
    request_id: str | None = None  # under way
    num_requests: int = 0
    sent_at: float = 0.0
    player: VirtualPlayer = field(default_factory=VirtualPlayer)
    audio_s: float = 0.0
    stalls_s: list[float] = field(default_factory=list)
    first_audio_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def next_request(self, now: float, num_frames: tuple[int, int]) -> EngineCoreRequest | None:
        """A request when one is due."""
        if self.request_id is not None or now < self.due:
            return None
        self.num_requests += 1
        self.request_id = f"{self.name}-{self.num_requests}"
        self.sent_at = now
        self.player = VirtualPlayer()
        request = make_request(
            self.request_id,
            num_frames=self.rng.randint(*num_frames),
            prompt_len=self.rng.randint(*PROMPT_LENS),
            seed=self.rng.randrange(2**31),
        )
        listener = Listener(self.player.speed, dry_at=now) if self.listens else None
        return dataclasses.replace(request, arrival_time=now, listener=listener)

    def take(self, output: EngineCoreOutput, now: float, info: EngineInfo) -> None:
        """Hear what has come; what an earlier request still says is not heard."""
        if output.request_id != self.request_id:
            return
        seconds = len(output.audio) / BYTES_PER_SAMPLE / info.sample_rate
        if seconds and not self.player.has_started:
            self.first_audio_s.append(now - self.sent_at)
        self.player.feed(now, seconds)
        self.audio_s += seconds
        if output.finish_reason is not None:
            self.player.end()
            self._close(now)
            # Whoever listens hears it to the end first.
            self.due = max(now, self.player.dry_at or now) if self.listens else now

    def leave(self, now: float) -> None:
        """Give up what is under way; a wait for first audio counts as long as it lasted."""
        if self.request_id is None:
            return
        if not self.player.has_started:
            self.first_audio_s.append(now - self.sent_at)
        self.player.leave(now)
        self._close(now)

    def _close(self, now: float) -> None:
        self.stalls_s += self.player.stalls_s
        self.latencies_s.append(now - self.sent_at)
        self.request_id = None


def play(core: EngineCore, settings: Settings, seed: int) -> dict[str, float]:
    """Figures of one turn; the engine is idle before and after it."""
    clients = make_clients(settings, seed)
    start = now = time.monotonic()
    while now < start + settings.seconds:
        for client in clients.values():
            request = client.next_request(now, settings.num_frames)
            if request is not None:
                core.add_request(request)
        outputs = core.step().outputs
        now = time.monotonic()
        for output in outputs:
            clients[output.request_id.rpartition("-")[0]].take(output, now, core.info)
    open_ids = tuple(client.request_id for client in clients.values() if client.request_id)
    for client in clients.values():
        client.leave(now)
    core.abort_requests(open_ids)
    while core.has_work():
        core.step()
    return summarize(list(clients.values()), now - start)


def make_clients(settings: Settings, seed: int) -> dict[str, Client]:
    """Clients by name; the same seed makes the same requests."""
    now = time.monotonic()
    rng = random.Random(seed)
    clients = {}
    for index in range(settings.num_listeners + settings.num_others):
        listens = index < settings.num_listeners
        pause_s = rng.uniform(0, MAX_FIRST_PAUSE_S) if listens else 0.0
        client_rng = random.Random(rng.randrange(2**32))
        clients[f"c{index}"] = Client(f"c{index}", client_rng, listens, due=now + pause_s)
    return clients


def summarize(clients: Sequence[Client], wall_s: float) -> dict[str, float]:
    listeners = [client for client in clients if client.listens]
    others = [client for client in clients if not client.listens]
    stalls_s = [stall for client in listeners for stall in client.stalls_s]
    waits_s = [wait for client in listeners for wait in client.first_audio_s]
    first_audio = percentiles(waits_s, (50, 95))
    heard_s = sum(client.audio_s for client in listeners)
    others_s = sum(client.audio_s for client in others)
    return {
        "num_underruns": len(stalls_s),
        "stalled_s": sum(stalls_s),
        "silent_s": sum(waits_s) + sum(stalls_s),
        "first_audio_p50_s": first_audio.get("p50", 0.0),
        "first_audio_p95_s": first_audio.get("p95", 0.0),
        "heard_s_per_s": heard_s / wall_s,
        "others_s_per_s": others_s / wall_s,
        "audio_s_per_s": (heard_s + others_s) / wall_s,
        "others_longest_s": max((s for client in others for s in client.latencies_s), default=0.0),
    }


def measure(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """All rounds, the policies taking turns in each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "lm", size=arguments.size, seed=0)
        make_codec(folder / "codec", layout="boson", size=arguments.codec, seed=0)
        cores = {
            policy: make_core(
                folder,
                decodes_audio=True,
                player_deadlines=is_on or arguments.turns_alone,
                max_num_seqs=arguments.max_num_seqs,
                cpu_threads=arguments.num_threads,
            )
            for policy, is_on in POLICIES.items()
        }
    if arguments.turns_alone:
        cores["off"]._scheduler._row_turns = NoTurns(1 / cores["off"].info.frame_rate)
    rounds: list[dict[str, dict[str, float]]] = []
    for index in tqdm(range(arguments.num_rounds), desc="rounds", unit="round"):
        order = list(cores) if index % 2 == 0 else list(reversed(cores))
        figures = {policy: play(cores[policy], settings, seed=index) for policy in order}
        rounds.append(figures)
    for core in cores.values():
        core.shutdown()
    return {"settings": dataclasses.asdict(settings), "rounds": rounds, **compare(rounds)}


def compare(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of each policy, and of the rounds' ratios on / off; None where off is always 0."""
    medians = {
        policy: {name: median(figures[policy][name] for figures in rounds) for name in FIGURES}
        for policy in POLICIES
    }
    ratios: dict[str, float | None] = {}
    for name in FIGURES:
        values = [r["on"][name] / r["off"][name] for r in rounds if r["off"][name]]
        ratios[name] = median(values) if values else None
    return {"medians": medians, "ratios": ratios}


def print_results(results: dict[str, Any]) -> None:
    rows = [[policy, *figures.values()] for policy, figures in results["medians"].items()]
    rows.append(["on / off", *results["ratios"].values()])
    print(format_table(["deadlines", *FIGURES.values()], rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model")
    parser.add_argument("--codec", choices=tuple(CODEC_SIZES), default="full")
    parser.add_argument("--listeners", type=int, default=4)
    parser.add_argument("--others", type=int, default=28)
    parser.add_argument("--num-frames", type=int, nargs=2, default=(60, 200), help="25 a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of one turn")
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=0, help="0: all clients together")
    parser.add_argument("--num-threads", type=int, default=0, help="0: the engine's choice")
    parser.add_argument(
        "--turns-alone",
        action="store_true",
        help="the codec goes by deadlines in both; only the rows' turns are off or on",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.listeners < 1 or arguments.others < 0:
        parser.error("--listeners must be 1 or more, --others 0 or more")
    arguments.max_num_seqs = arguments.max_num_seqs or arguments.listeners + arguments.others
    settings = Settings(
        arguments.listeners, arguments.others, tuple(arguments.num_frames), arguments.seconds
    )
    results = measure(arguments, settings)
    print_results(results)
    if arguments.json:
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
