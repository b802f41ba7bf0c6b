//! The SQLite store of hapax: embedded, durable, transactional handlers.
