"""A login to Kafka done by hand, to learn what the broker says to it.

kafka-python 3.0 drops the answer to a login that fails where the broker closes the connection
behind it, and reports a timeout: nobody could tell a wrong password from a broker that is away.
"""

import socket
import time
import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through an importlib.resources call that 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.errors import (
        KafkaError,
        NoError,
        SaslAuthenticationFailedError,
        UnsupportedSaslMechanismError,
        for_code,
    )
    from kafka.net.sasl import get_sasl_mechanism
    from kafka.protocol.parser import KafkaProtocol
    from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest

__all__ = ["why_login_fails"]

_TIMEOUT_S = 5.0
_RECEIVED = 65_536


def why_login_fails(config: Mapping[str, Any]) -> KafkaError | None:
    """Log in to each bootstrap server in turn; give what one of them refuses it with.

    `config` is a client's. None where none refuses, or none can be asked.
    """
    if not config["security_protocol"].startswith("SASL"):
        return None
    for server in config["bootstrap_servers"]:
        host, _, port = server.rpartition(":")
        try:
            with _connected(host, int(port), config) as connection:
                _log_in(connection, host, config)
        except (SaslAuthenticationFailedError, UnsupportedSaslMechanismError) as error:
            return error
        except (OSError, ValueError, KafkaError):
            continue
    return None


def _connected(host: str, port: int, config: Mapping[str, Any]) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=_TIMEOUT_S)
    context = config.get("ssl_context")
    try:
        return (
            connection if context is None else context.wrap_socket(connection, server_hostname=host)
        )
    except BaseException:
        connection.close()
        raise


def _log_in(connection: socket.socket, host: str, config: Mapping[str, Any]) -> None:
    protocol = KafkaProtocol(client_id=config["client_id"])
    name = config["sasl_mechanism"]
    offered = _ask(connection, protocol, SaslHandshakeRequest(mechanism=name, version=1))
    if name not in offered.mechanisms:
        raise UnsupportedSaslMechanismError(f"{name} is not one of {', '.join(offered.mechanisms)}")
    mechanism = get_sasl_mechanism(name)(host=host, **config)
    while not mechanism.is_done():
        token = mechanism.auth_bytes()
        answer = _ask(connection, protocol, SaslAuthenticateRequest(token, version=1))
        if for_code(answer.error_code) is not NoError:
            raise SaslAuthenticationFailedError(answer.error_message)
        mechanism.receive(answer.auth_bytes)


def _ask(connection: socket.socket, protocol: KafkaProtocol, request: Any) -> Any:  # noqa: ANN401 - kafka-python has no types
    protocol.send_request(request)
    connection.sendall(protocol.send_bytes())
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        received = connection.recv(_RECEIVED)
        if not received:
            break
        for _, response in protocol.receive_bytes(received):
            return response
    message = "no answer"
    raise OSError(message)
