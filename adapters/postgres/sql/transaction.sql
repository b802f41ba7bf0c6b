-- Opens a handler's transaction. Renewals of its lease must not make its end fail, so each statement sees what is
-- committed; the mark is gone as soon as the handler ends the transaction itself.
BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL hapax.tx = '{mark}'
