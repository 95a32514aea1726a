"""Exit with 0 if a Flower process answers that it is well.

healthcheck.py https://localhost:8000/health CA.crt
healthcheck.py http://127.0.0.1:9094/health
healthcheck.py grpc://127.0.0.1:8099
"""

import ssl
import sys
import urllib.request

TIMEOUT = 5.0  # seconds


def serving(url: str, authority: str | None) -> bool:
    """Ask an address of Flower's HTTP API, or of the gRPC service that `--health-server-address` starts."""
    kind, _, address = url.partition("://")
    if kind == "grpc":
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if kind == "https":
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)))
    with urllib.request.build_opener(*handlers).open(url, timeout=TIMEOUT) as answer:
        return bool(answer.status == 200)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) else 1)
