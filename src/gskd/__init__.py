"""gskd: small semantic-segmentation networks that keep the global structure a large teacher sees."""

from gskd.errors import GSKDError

__all__ = ["GSKDError"]
__version__ = "0.1.0"
