"""Where two prompts or two requests part, why, and what to change: pure functions on plain data.

Nothing here tokenizes, renders a chat template or looks into a cache.
"""

from tokcache.differences.chat import template_variables, to_chat
from tokcache.differences.classes import Difference, DifferenceClass
from tokcache.differences.comparison import compare_requests
from tokcache.differences.log import Entry, read_log, read_request
from tokcache.differences.request import Message, Part, Request, parse_request
from tokcache.differences.session import Turn, compare_session
from tokcache.differences.texts import classify

__all__ = [
    "Difference",
    "DifferenceClass",
    "Entry",
    "Message",
    "Part",
    "Request",
    "Turn",
    "classify",
    "compare_requests",
    "compare_session",
    "parse_request",
    "read_log",
    "read_request",
    "template_variables",
    "to_chat",
]
