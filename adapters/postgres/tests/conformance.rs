//! The PostgreSQL store passes its suites: directly, through PgBouncer 1.18 in transaction mode, and as a role with no
//! more than SELECT, INSERT, UPDATE and DELETE on hapax' tables. Each case has a schema of its own.

mod fixture;

use fixture::{Place, Through};

hapax_testkit::store_conformance!(records, Place::reached(Through::Owner).await);
hapax_testkit::transactional_conformance!(transactions, Place::reached(Through::Owner).await);

hapax_testkit::store_conformance!(records_through_a_bouncer, Place::reached(Through::Bouncer).await);
hapax_testkit::transactional_conformance!(transactions_through_a_bouncer, Place::reached(Through::Bouncer).await);

hapax_testkit::store_conformance!(records_with_least_rights, Place::reached(Through::LeastRights).await);
hapax_testkit::transactional_conformance!(transactions_with_least_rights, Place::reached(Through::LeastRights).await);
