"""Where two prompts or two requests part, why, and what to change: pure functions on plain data.

Nothing here tokenizes, renders a chat template or looks into a cache.
"""

from tokcache.differences.classes import Difference, DifferenceClass
from tokcache.differences.comparison import compare_requests
from tokcache.differences.request import Message, Part, Request, parse_request
from tokcache.differences.texts import classify

__all__ = [
    "Difference",
    "DifferenceClass",
    "Message",
    "Part",
    "Request",
    "classify",
    "compare_requests",
    "parse_request",
]
