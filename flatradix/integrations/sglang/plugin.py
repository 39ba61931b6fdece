"""SGLang 0.5.23 with flatradix as its prefix cache: `--radix-cache-backend flatradix`.

The entry point `sglang.srt.plugins` names `register`. SGLang calls `register` in its launcher and in every scheduler;
users need not import this module. docs/sglang.md says what is served and what is refused.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

NAME = "flatradix"
VERSION = "0.5.23"

try:
    from sglang.srt.mem_cache import registry

    from flatradix.integrations.sglang.cache import FlatRadixCache
    from flatradix.integrations.sglang.refusals import refuse_unserved
    from flatradix.integrations.sglang.waiting import register_if_asked
    from flatradix.warm_up import warm_up
except ImportError as error:
    raise ImportError(
        f"flatradix.integrations.sglang.plugin works inside SGLang {VERSION}, which does not import here ({error}): "
        f"pip install sglang=={VERSION}"
    ) from error

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

__all__ = ["FlatRadixCache", "create", "register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Register `--radix-cache-backend flatradix` with SGLang in this process. A second call changes nothing.

    If FLATRADIX_QUEUE is 1, also register the hooks of the waiting queue.
    """
    installed = _installed_version()
    if installed not in (None, VERSION):
        logger.warning("flatradix was tested with SGLang %s, and this is %s", VERSION, installed)
    if registry.get_radix_cache_factory(NAME) is None:
        registry.register_radix_cache_backend(NAME, create)
    register_if_asked()


def create(context: Any) -> BasePrefixCache:
    """Return the cache of one scheduler, from SGLang's TreeCacheBuildContext.

    With --disable-radix-cache, or if SGLang disables the prefix cache for a model, this is SGLang's own cache, which
    then caches nothing. Raises ValueError, naming the option, for what this cache cannot serve. Raises
    DeviceUnavailableError if FLATRADIX_DEVICE names a device that cannot be used.
    """
    if context.disable_radix_cache:
        logger.info("the prefix cache is disabled: SGLang's own is used in the place of flatradix")
        return registry.default_radix_cache_factory(context)
    refuse_unserved(context)
    cache = FlatRadixCache(context.params)
    # Compile now, not during the first requests.
    warm_up(cache.tree.device, context.params.page_size, context.params.is_eagle, cache.tree.slot_device)
    return cache


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return None
