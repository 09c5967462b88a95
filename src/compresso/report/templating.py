"""The templates of pages and cards, each compiled once a process."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment(*, escaped: bool) -> Environment:
    """jinja2 as reports use it: what is not given is an error; `escaped`, untrusted text is no markup."""
    return Environment(
        loader=PackageLoader("compresso.report", "templates"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
