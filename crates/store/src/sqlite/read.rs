//! The tables, and the statements that read them. Used by the writer and by the readers.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::error::{Result, StoreError};
use crate::types::*;

/// Bits of a log id below the revision: the place of a change within its transaction.
const SUB_BITS: u32 = 20;
/// Most changes of one transaction; only deleting a range can come near.
pub(super) const MAX_CHANGES: u64 = 1 << SUB_BITS;
/// Keys are UTF-8, so no key is at or after this.
const AFTER_ALL: &[u8] = &[0xff];
/// A chunk of history ends with the revision that fills it.
const CHUNK_BYTES: usize = 1 << 20;

/// Version of the tables, in `user_version`.
pub(super) const SCHEMA_VERSION: i64 = 1;

/// `log` holds every change once, in order, with the value; `live` points from each existing key to its last put.
/// The store's revision is not kept anywhere: it is that of the last change (or the compacted one, when that is
/// later), which saves writing one more page in each transaction.
pub(super) const SCHEMA: &str = "
CREATE TABLE log (
    id INTEGER PRIMARY KEY,       -- revision << 20 | place within the transaction
    key BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    version INTEGER NOT NULL,
    lease INTEGER NOT NULL,       -- 0: none
    prev INTEGER NOT NULL,        -- id of the put that this one replaces; 0: none
    value BLOB                    -- NULL: the key was deleted. Last, so that the rest is read without it
);
CREATE INDEX log_by_key ON log (key, id);
CREATE TABLE live (key BLOB PRIMARY KEY, id INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX live_by_lease ON live (lease, key) WHERE lease != 0;
CREATE TABLE lease (id INTEGER PRIMARY KEY, ttl_seconds INTEGER NOT NULL);
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('compact_revision', 0);
";

pub(super) fn log_id(revision: Revision, place: u64) -> i64 {
    ((revision << SUB_BITS) | place) as i64
}

pub(super) fn revision_of(id: i64) -> Revision {
    (id as u64) >> SUB_BITS
}

/// Is there no room, or no more than a quota allows? SQLite takes the second for any other error of writing. To be asked
/// right after the error, before another call of the system fails.
pub(super) fn is_full(error: &rusqlite::Error) -> bool {
    let quota = || {
        let code = error.sqlite_error().map(|error| error.extended_code);
        code == Some(rusqlite::ffi::SQLITE_IOERR_WRITE)
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::QuotaExceeded
    };
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) || quota()
}

/// An error of SQLite that left nothing behind.
pub(super) fn failed(error: rusqlite::Error) -> StoreError {
    match is_full(&error) {
        true => StoreError::Full(error.to_string()),
        false => StoreError::Unavailable(error.to_string()),
    }
}

pub(super) fn compact_revision(conn: &Connection) -> Result<Revision> {
    let sql = "SELECT value FROM meta WHERE name = 'compact_revision'";
    let mut statement = conn.prepare_cached(sql).map_err(failed)?;
    statement.query_row([], |row| row.get::<_, i64>(0)).map(|n| n as u64).map_err(failed)
}

pub(super) fn current_revision(conn: &Connection) -> Result<Revision> {
    let mut statement = conn.prepare_cached("SELECT ifnull(max(id), 0) FROM log").map_err(failed)?;
    let last: i64 = statement.query_row([], |row| row.get(0)).map_err(failed)?;
    Ok(revision_of(last).max(compact_revision(conn)?).max(1))
}

/// A key, its log id, and what the log says. Columns: id, key, value, create_revision, version, lease.
fn key_value(row: &Row<'_>) -> rusqlite::Result<KeyValue> {
    let key = String::from_utf8_lossy(row.get_ref(1)?.as_blob()?).into_owned();
    let value = match row.get_ref(2)? {
        rusqlite::types::ValueRef::Null => Bytes::new(),
        value => Bytes::copy_from_slice(value.as_blob()?),
    };
    let lease: i64 = row.get(5)?;
    Ok(KeyValue {
        key,
        value,
        create_revision: row.get::<_, i64>(3)? as u64,
        mod_revision: revision_of(row.get(0)?),
        version: row.get::<_, i64>(4)? as u64,
        lease: (lease != 0).then_some(LeaseId(lease)),
    })
}

/// Reads a key as the connection's transaction sees it, with its log id.
pub(super) fn get(conn: &Connection, key: &str) -> Result<Option<(i64, KeyValue)>> {
    let sql = "SELECT log.id, log.key, log.value, log.create_revision, log.version, log.lease \
               FROM live JOIN log ON log.id = live.id WHERE live.key = ?1";
    let mut statement = conn.prepare_cached(sql).map_err(failed)?;
    statement.query_row([key.as_bytes()], |row| Ok((row.get(0)?, key_value(row)?))).optional().map_err(failed)
}

/// Keys of a range with their log ids; no values.
pub(super) fn live_ids(conn: &Connection, range: &KeyRange) -> Result<Vec<(i64, String)>> {
    let (start, end) = range.bounds();
    let sql = "SELECT id, key FROM live WHERE key >= ?1 AND key < ?2 ORDER BY key";
    let mut statement = conn.prepare_cached(sql).map_err(failed)?;
    let rows = statement
        .query_map(params![start, end.as_deref().unwrap_or(AFTER_ALL)], |row| {
            Ok((row.get(0)?, String::from_utf8_lossy(row.get_ref(1)?.as_blob()?).into_owned()))
        })
        .map_err(failed)?;
    rows.collect::<rusqlite::Result<_>>().map_err(failed)
}

/// Runs `body` on one snapshot.
pub(super) fn snapshot<T>(conn: &Connection, body: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let transaction = conn.unchecked_transaction().map_err(failed)?;
    let result = body(&transaction)?;
    transaction.commit().map_err(failed)?;
    Ok(result)
}

pub(super) fn range(conn: &Connection, request: &RangeRequest) -> Result<RangeResponse> {
    let revision = current_revision(conn)?;
    let (start, end) = request.range.bounds();
    let end = end.as_deref().unwrap_or(AFTER_ALL);
    // One more than asked for tells whether there is more.
    let limit = if request.limit == 0 { -1 } else { request.limit as i64 + 1 };
    let collect = |sql: &str, parameters: &[&dyn rusqlite::ToSql]| -> Result<Vec<KeyValue>> {
        let mut statement = conn.prepare_cached(sql).map_err(failed)?;
        let rows = statement.query_map(parameters, key_value).map_err(failed)?;
        rows.collect::<rusqlite::Result<_>>().map_err(failed)
    };
    let mut kvs = match request.at_revision {
        Some(asked) if asked > revision => {
            return Err(StoreError::FutureRevision { asked, current: revision });
        }
        Some(asked) if asked < compact_revision(conn)? => {
            return Err(StoreError::Compacted { compact_revision: compact_revision(conn)? });
        }
        Some(asked) if asked < revision => collect(
            "SELECT log.id, log.key, CASE WHEN ?5 THEN x'' ELSE log.value END, \
                    log.create_revision, log.version, log.lease \
             FROM (SELECT key, max(id) AS id FROM log WHERE key >= ?1 AND key < ?2 AND id < ?4 GROUP BY key) AS last \
             JOIN log ON log.id = last.id WHERE log.value IS NOT NULL ORDER BY last.key LIMIT ?3",
            &[&start, &end, &limit, &log_id(asked + 1, 0), &request.keys_only],
        )?,
        _ => collect(
            "SELECT log.id, log.key, CASE WHEN ?4 THEN x'' ELSE log.value END, \
                    log.create_revision, log.version, log.lease \
             FROM live JOIN log ON log.id = live.id WHERE live.key >= ?1 AND live.key < ?2 \
             ORDER BY live.key LIMIT ?3",
            &[&start, &end, &limit, &request.keys_only],
        )?,
    };
    let more = request.limit != 0 && kvs.len() > request.limit;
    if more {
        kvs.truncate(request.limit);
    }
    Ok(RangeResponse { kvs, revision, more })
}

/// A piece of history.
pub(super) struct Chunk {
    pub batches: Vec<WatchBatch>,
    /// All of the history up to here is in `batches`.
    pub through: Revision,
    /// `through` is the store's revision: there is no more.
    pub complete: bool,
}

/// What happened under `prefix` at `from` and later, as far as fits.
pub(super) fn history(conn: &Connection, prefix: &str, from: Revision) -> Result<Chunk> {
    let compacted = compact_revision(conn)?;
    if from <= compacted {
        return Err(StoreError::Compacted { compact_revision: compacted });
    }
    let current = current_revision(conn)?;
    let sql =
        "SELECT id, key, value, create_revision, version, lease, prev FROM log WHERE id >= ?1 ORDER BY id";
    let mut statement = conn.prepare_cached(sql).map_err(failed)?;
    let mut rows = statement.query([log_id(from, 0)]).map_err(failed)?;
    let mut batches: Vec<WatchBatch> = Vec::new();
    let (mut bytes, mut through) = (0, from.saturating_sub(1));
    while let Some(row) = rows.next().map_err(failed)? {
        let revision = revision_of(row.get(0).map_err(failed)?);
        if bytes > CHUNK_BYTES && revision > through {
            return Ok(Chunk { batches, through, complete: false });
        }
        through = revision;
        if !row.get_ref(1).map_err(failed)?.as_blob().is_ok_and(|key| key.starts_with(prefix.as_bytes())) {
            continue;
        }
        let kv = key_value(row).map_err(failed)?;
        let prev: i64 = row.get(6).map_err(failed)?;
        let deleted = matches!(row.get_ref(2).map_err(failed)?, rusqlite::types::ValueRef::Null);
        bytes += kv.key.len() + kv.value.len();
        let event = Event {
            prev_mod_revision: (prev != 0).then(|| revision_of(prev)),
            change: if deleted { Change::Delete { key: kv.key } } else { Change::Put(kv) },
        };
        match batches.last_mut() {
            Some(batch) if batch.revision == revision => batch.events.push(event),
            _ => batches.push(WatchBatch { revision, events: vec![event] }),
        }
    }
    Ok(Chunk { batches, through: current.max(through), complete: true })
}
