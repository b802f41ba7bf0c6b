-- Opens a handler's transaction. Renewals of its lease must not make its end fail, so each statement sees what is
-- committed; the mark is gone as soon as the handler ends the transaction itself. The level is set twice, since one of
-- the two fails (25001) inside a transaction that somebody left open and has run a query; a query of ours would tell as
-- well, but then the handler could not choose the level any more.
BEGIN ISOLATION LEVEL SERIALIZABLE; SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL hapax.tx = '{mark}'
