"""What racecheck reports of the Hopper kernels, less what is known to be in order.

racecheck follows neither mbarriers nor one warpgroup's bar.arrive that another waits for, so it takes
words that are handed over in shared memory behind one of those for a race. KNOWN names each by its
kernel and by the statements on both sides; whatever else it reports is a failure. Statements are
looked up in the sources, by the lines that a build with -lineinfo knows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Known:
    kernel: str
    write: str  # part of the source line
    other: str
    why: str


KNOWN = (
    *(Known("sm90_prefill", f"mailbox()->tile = {value}", "mailbox()->tile;",
            "the number of the next tile: readers wait for mbarrier kQFull behind the write, the next "
            "write for kQFree behind all reads")
      for value in ("is_last", "index", "-1")),  # the latter two over codes
    Known("sm90_prefill", "mailbox()->widened_tile = is_last", "mailbox()->widened_tile;",
          "the same for those who widen, with kTileTold and kTileHeard"),
    Known("sm90_prefill", "dropped(number) = number + 1", "dropped(number) == number + 1",
          "what cleaning lost: a consumer has waited for mbarrier kVFull, over codes kKFull, of every "
          "tile that was cleaned; the word of the tile after next, over codes of the fourth, is "
          "another tile's"),
    Known("sm90_prefill", "dropped(number) = number + 1", "dropped(number) = number + 1",
          "cleaners write the same number"),
    *(Known("sm90_prefill", "*reinterpret_cast<uint4*>(panel + at.wide[", other,
            "a widened tile, in a slot in which others had widened one: they wait for kKFree, which "
            "consumers give behind all reads of the one before")
      for other in ("*reinterpret_cast<uint4*>(panel + at.wide[", "*chunk = ")),
    Known("sm90_prefill", '"r"(valid_bytes)', "pairs[4 * i + threadIdx.x % 4]",
          "scales of tokens: who asked for them waits for them and arrives at kKFull, for which "
          "consumers have waited; the slot's next ones are asked for behind kKFree of a later tile"),
    Known("sm90_decode", "[at + 32 * i] =", "scales[4 * i]",
          "scales of tokens: written in front of the arrival at `full`, for which consumers have "
          "waited, and again behind `empty`"),
    Known("sm90_prefill_wide", '"r"(rank), "r"(value)', "ld.shared.b32",
          "the next tile: readers wait for mbarrier kTileFull behind the write, the next write for "
          "kTileFree behind all reads"),
    Known("sm90_prefill_wide", "mailbox()->tile[word] = is_last", "mailbox()->tile[number % kToldTiles]",
          "the same over codes, in a word for each of two tiles, with a pair of those mbarriers each"),
    Known("sm90_prefill_wide", "dropped(number, ", "dropped(number, half) != number + 1",
          "what cleaning lost: a consumer has waited for mbarrier kSlotFull of every slot that was "
          "cleaned; the word of the tile after next, over codes of the fourth, is another tile's"),
    Known("sm90_prefill_wide", "dropped(number, ", "dropped(number, ",
          "cleaners write the same number"),
    *(Known("sm90_prefill_wide", "*to(at, half, ", other,
            "a widened slot, in which others had widened one: they wait for kSlotFree, which "
            "consumers give behind all reads of the one before")
      for other in ("*to(at, half, ", "*chunk = ")),
    Known("sm90_prefill_wide", '"r"(valid_bytes)', "pairs[4 * i + threadIdx.x % 4]",
          "scales of tokens: who asked for them waits for them and arrives at kSlotFull, for which "
          "consumers have waited; the slot's next ones are asked for behind kSlotFree of later slots"),
    Known("sm90_prefill_wide", "block.s_factors()[accumulator_row(r)] = softmax.online.correction[r]",
          "block.s_factors()[accumulator_row(",
          "corrections: the left warpgroup arrives at kWeightsFull behind the write, where the right "
          "one waits, which arrives at kWeightsFree behind the read"),
    Known("sm90_prefill_wide",
          "block.s_factors()[Block::kNorms + accumulator_row(r)] = softmax.norm(r)",
          "block.s_factors()[Block::kNorms + accumulator_row(",
          "norms: the same with kNormFull and kNormFree"),
    *(Known(kernel, f"{number}()[column] = ", read,
            "numbers of the queries: a consumer waits for an mbarrier (kQkFull, kQueriesFull) behind the "
            "write, the next write for another behind all reads")
      for kernel in ("sm90_backward", "sm90_backward_wide")
      for number, read in (("shift", "const float2*>(first + "), ("delta", "const float2*>(first + "),
                           ("first_key", "(queries.first_key() + "),
                           ("key_count", "(queries.key_count() + "))),
    *(Known("sm90_backward", f"{number}()[column] = ", "s, q + ptx::descriptor_offset(",
            "the same: where the compiler moves such a read between products, it has a product's line")
      for number in ("shift", "delta")),
    Known("sm90_backward", "exchange()[i * 128] = make_float4(", "four = block.exchange()[i * 128]",
          "weights: the one role arrives at kWeightsFull behind the write, where the other waits, which "
          "arrives at kWeightsFree behind the read"),
    *(Known("sm90_backward_wide", "to[i * 128] = {", other,
            "weights and gradients of scores: a word is one thread's of either consumer, who write it "
            "in turns, each behind kWeightsFull, kWeightsFree or kGradientsFull of the other's last use")
      for other in ("to[i * 128] = {", "four = from[i * 128]")),
)

# What racecheck names is the function on the line: mostly a member of one of these, or what one
# kernel alone calls.
KERNEL_OF = {"Prefill": "sm90_prefill", "WidenedTile": "sm90_prefill", "WidenedSlot": "sm90_prefill_wide", "decode": "sm90_decode",
             "Wide": "sm90_prefill_wide", "store_at": "sm90_prefill_wide",
             "load_word": "sm90_prefill_wide", "Gradient": "sm90_backward",
             "WideGradient": "sm90_backward_wide"}
PART_OF = re.compile(r"wh::cuda::(?:ptx::)?(decode|Prefill|WidenedTile|WidenedSlot|Wide|Gradient|WideGradient|store_at|load_word)(?:Code)?(?:Block|Consumer|Left|Right|Queries|Numbers|Weights)?\b")
ACCESS = re.compile(r"(?P<kind>Read|Write|Atomic)\b.*? access at (?P<where>.+)$")
PLACE = re.compile(r"(?P<file>[\w./+-]+\.(?:cuh|cu|h)):(?P<line>\d+)")


@dataclass(frozen=True)
class Access:
    kind: str
    kernel: str     # empty: it is in a function that several call
    place: str      # "file:line"; empty: the instruction has none
    statement: str  # that line

    @staticmethod
    def of(match: re.Match[str], statement: "Statement") -> "Access":
        where = match["where"]
        found = re.search(r"\b(sm90_\w+|cuda_\w+|few_rows|combine)\b", where)
        part = PART_OF.search(where)
        # Over codes, sm90_prefill_codes: the same statements.
        kernel = found[1].removesuffix("_codes") if found else KERNEL_OF[part[1]] if part else ""
        place = PLACE.search(where)
        return Access(match["kind"], kernel,
                      f"{place['file']}:{place['line']}" if place else "",
                      statement(kernel, place["file"], int(place["line"])) if place else "")

    def may_be(self, part: str) -> bool:
        """Some instructions of a build with lines have none: what meets them tells."""
        return part in self.statement or not self.place

    def __str__(self) -> str:
        return f"{self.kind} at {self.place or 'an unknown line'} ({self.statement.strip()})"


Statement = Callable[[str, str, int], str]  # of a kernel, in a file, on a line


def source_line(root: Path) -> Statement:
    """The file as racecheck names it, with or without its folder."""
    files: dict[str, list[Path]] = {}
    for path in (root / "src").rglob("*.cu*"):
        files.setdefault(path.name, []).append(path)

    def line(kernel: str, name: str, number: int) -> str:
        paths = files.get(Path(name).name, [])
        if len(paths) > 1:  # kernel.cuh and block.cuh: of the kernel's own folder, or what all have
            own = f"/{kernel.replace('sm90_', 'sm90/').replace('cuda_', '')}/"
            for folder in ([own] if kernel else []) + ["/sm90/common/"]:
                if nearest := [path for path in paths if folder in str(path)]:
                    paths = nearest
                    break
        if len(paths) != 1:
            return ""
        lines = paths[0].read_text().splitlines()
        return lines[number - 1] if number <= len(lines) else ""

    return line


def races(log: str, statement: Statement) -> list[tuple[Access, Access]]:
    """Each first access of a report with each of the others."""
    found: list[tuple[Access, Access]] = []
    first: Access | None = None
    for text in log.splitlines():
        line = text.lstrip("= ")
        match = ACCESS.search(line)
        if match is None:
            continue
        access = Access.of(match, statement)
        if "Race reported between" in line or first is None:
            first = access
        elif line.startswith("and "):
            found.append((first, access))
    return found


def known(a: Access, b: Access) -> Known | None:
    for one in KNOWN:
        if {a.kernel, b.kernel} - {""} != {one.kernel}:
            continue
        for write, other in ((a, b), (b, a)):
            if (write.kind == "Write" and write.may_be(one.write) and other.may_be(one.other)
                    and (write.place or other.place)):
                return one
    return None


def unknown_races(log: str, root: Path) -> list[str]:
    """What has to fail, in words. Nothing is known of a build without line numbers."""
    pairs = races(log, source_line(root))
    unknown = [(a, b) for a, b in pairs if known(a, b) is None]
    failures = sorted({f"{a.kernel or b.kernel}: {a} and {b}" for a, b in unknown})
    counted = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log)
    if not pairs and any(int(count) for count in counted):
        failures.append(f"{counted[-1]} hazards that could not be read")
    if any(not a.place or not b.place for a, b in unknown):
        failures.append("lines are unknown: configure with -DCMAKE_CUDA_FLAGS=-lineinfo")
    return failures
