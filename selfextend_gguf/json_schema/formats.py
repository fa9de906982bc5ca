"""Formats of strings, where llguidance's own would let wrong ones pass."""

from __future__ import annotations

#: Formats that llguidance keeps by itself.
KEPT_FORMATS = ("duration", "email", "ipv4", "ipv6", "uri", "uuid")

_DATE = (
    "(?:[1-9][0-9]{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)"
    "|(?:0[13578]|1[02])-31)|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_CLOCK})"
_LABEL = "[A-Za-z0-9]{1,31}(?:-[A-Za-z0-9]{1,31})?"

#: Patterns of formats of which llguidance takes what is none: 29 February in any year, the 60th second of any minute,
#: names of hosts that are too long or no Punycode.
PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,2}}$",
}
