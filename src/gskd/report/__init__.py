"""One page about runs: scores, costs, pictures, and the structure that networks see (run folders -> HTML)."""

from gskd.report.content import Content, gather
from gskd.report.page import write_page

__all__ = ["Content", "gather", "write_page"]
