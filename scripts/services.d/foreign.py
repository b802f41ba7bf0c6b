"""Sends events as others do: through the CloudEvents SDK for Python and the clients that Python people use.

    foreign.py BROKER URL TOPIC

Two events in each content mode, each of them twice: with ids sdk-binary-1, sdk-structured-1 and so on.
"""

import sys
from urllib.parse import urlsplit

from cloudevents.core.bindings import amqp, kafka, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

SOURCE = "https://python.example/sdk"


def event(id):
    attributes = {
        "id": id,
        "source": SOURCE,
        "type": "com.example.sent",
        "datacontenttype": "application/json",
        "partitionkey": "python",
    }
    return CloudEvent(attributes=attributes, data={"id": id, "what": "bücher"})


def events(binding):
    """Ids and messages of a binding, in both modes, each twice."""
    for mode, convert in (("binary", binding.to_binary), ("structured", binding.to_structured)):
        for number in (1, 2):
            message = convert(event(f"sdk-{mode}-{number}"), JSONFormat())
            yield message
            yield message


def to_kafka(url, topic):
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=urlsplit(url).netloc, acks="all")
    for message in events(kafka):
        key = message.key.encode() if isinstance(message.key, str) else message.key
        sent = producer.send(topic, value=message.value, key=key, headers=list(message.headers.items()))
        sent.get(timeout=20)
    producer.close()


def to_rabbitmq(url, queue):
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    # The SDK knows two ways to write attributes on RabbitMQ: `ce-id` and, by the AMQP binding, `cloudEvents_id`.
    for message in events(rabbitmq):
        properties = pika.BasicProperties(headers=message.headers, content_type=message.content_type, delivery_mode=2)
        channel.basic_publish("", queue, message.body, properties, mandatory=True)
    for number in (1, 2):
        message = amqp.to_binary(event(f"sdk-amqp-{number}"), JSONFormat())
        headers = dict(message.application_properties)
        content_type = message.properties.get("content-type")
        properties = pika.BasicProperties(headers=headers, content_type=content_type, delivery_mode=2)
        channel.basic_publish("", queue, message.application_data, properties, mandatory=True)
    connection.close()


def to_redis(url, stream):
    import redis

    client = redis.Redis.from_url(url)
    # The SDK has no binding for Redis: fields are named as Kafka's headers, and the data is the field `data`.
    for message in events(kafka):
        client.xadd(stream, {**message.headers, "data": message.value})


def main():
    broker, url, topic = sys.argv[1:]
    {"kafka": to_kafka, "rabbitmq": to_rabbitmq, "redis": to_redis}[broker](url, topic)


if __name__ == "__main__":
    main()
