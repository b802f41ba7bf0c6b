"""Deletes a topic or queue, and what belongs to a group beside it.

    tidy.py BROKER URL TOPIC GROUP
"""

import sys
from urllib.parse import urlsplit


def in_kafka(url, topic, group):
    from kafka.admin import KafkaAdminClient

    admin = KafkaAdminClient(bootstrap_servers=urlsplit(url).netloc)
    ours = [name for name in admin.list_topics() if name == topic or name.startswith(f"{topic}.{group}.")]
    admin.delete_topics(ours)
    admin.close()


def in_rabbitmq(url, queue, group):
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(url))
    waits = [f"{queue}.{group}.retry.{1 << step}s" for step in range(13)]
    for name in [queue, f"{queue}.{group}.dead", *waits]:
        # Deleting what is not there is no error.
        connection.channel().queue_delete(name)
    connection.close()


def main():
    broker, url, topic, group = sys.argv[1:]
    {"kafka": in_kafka, "rabbitmq": in_rabbitmq}[broker](url, topic, group)


if __name__ == "__main__":
    main()
