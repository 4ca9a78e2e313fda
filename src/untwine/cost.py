"""What a result cost, as text: it stands beside every result that is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVERHEAD_TOKENS = ("gcd", "gcd_sampled", "labels")
OVERHEAD_SECONDS = ("gcd", "labels")


def cost_text(row: Mapping[str, Any]) -> str | None:
    """`1.23 M tokens of updates, and 45 000 (+4 %) for verdicts and labels; 12 min, of it 1 min for
    verdicts and labels` from `cost_tokens` and `cost_seconds` of a row (docs/run-directory.md);
    None where nothing was spent."""
    tokens, seconds = row.get("cost_tokens"), row.get("cost_seconds")
    if not isinstance(tokens, Mapping) or not isinstance(seconds, Mapping):
        return None
    plain = tokens.get("imitation", 0) + tokens.get("policy", 0)
    extra = sum(tokens.get(key, 0) for key in OVERHEAD_TOKENS)
    took = sum(seconds.get(key, 0) for key in ("cold_start", "rollout", "labels", "update"))
    more = sum(seconds.get(key, 0) for key in OVERHEAD_SECONDS)
    if not plain + extra:
        return None
    said = f"{count(plain)} tokens of updates"
    if extra:
        share = f" (+{100 * extra / plain:.0f}\u202f%)" if plain else ""
        said += f", and {count(extra)}{share} for verdicts and labels"
    if took:
        said += f"; {duration(took)}"
        said += f", of it {duration(more)} for verdicts and labels" if extra else ""
    return said


def count(value: float) -> str:
    """12 345, 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u202f{unit}"
    return f"{value:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
