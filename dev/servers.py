"""Real Kafka and Redis on this machine, without Docker: what tests and `make stack` start.

Each listens on the loopback interface alone, keeps data, configuration and log in the folder it is
given, can be stopped, killed and started again on the same port and data, and is ended by a guard
when the process that started it dies.

    with KafkaServer(folder / "kafka") as kafka, RedisServer(folder / "redis") as redis:
        create_topic(kafka.bootstrap_servers, "payments", partitions=4)
        ...
        kafka.kill()
        kafka.start()
"""

from dev.kafka_server import KafkaServer, create_topic
from dev.processes import ServerFailed, wait_until
from dev.redis_groups import RedisClusterServers, RedisSentinelServers
from dev.redis_server import RedisServer

__all__ = [
    "KafkaServer",
    "RedisClusterServers",
    "RedisSentinelServers",
    "RedisServer",
    "ServerFailed",
    "create_topic",
    "wait_until",
]
