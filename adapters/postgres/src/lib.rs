//! PostgreSQL as a store of processed events, with transactional handlers.
