"""The replica's front door: pure-ASGI middleware around vLLM's OpenAI app. Knows no Ray.

A request passes, in this order: `routes` (what is open), `auth` (who may), admission (how many at once, in
`middleware`), `request_body` (what may be asked), the app; its response passes `response`, which uses `errors` and
`usage`. `middleware.Gateway` ties them together.
"""

from dflash_serve.gateway.auth import ApiKeys, load_api_keys
from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.middleware import Gateway
from dflash_serve.gateway.record import RequestRecord
from dflash_serve.gateway.traffic import TrafficClasses

__all__ = ["ApiKeys", "Gateway", "GatewayConfig", "RequestRecord", "TrafficClasses", "load_api_keys"]
