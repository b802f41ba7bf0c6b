//! Redis Streams as a broker, and Redis as a store of processed events.
