//! The one writer: runs commands in groups, each group in one SQLite transaction and so with one wait for the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::{Connection, params};
use tokio::sync::{broadcast, oneshot};

use super::lease::Leases;
use super::read::{self, failed};
use crate::error::{Result, StoreError};
use crate::types::*;

/// Batches kept for watchers that are a little behind; whoever is further behind reads from the log.
const PUBLISHED: usize = 128;
/// A revision with more than this is not kept in memory for watchers: they read it from the log.
const PUBLISHED_BYTES: usize = 64 * 1024;
/// Automatic compaction works in steps, so that no single commit waits long for it.
const COMPACT_STEP: u64 = 256;

/// Adds a put to the log.
const INSERT_PUT: &str = "INSERT INTO log (id, key, value, create_revision, version, lease, prev) \
                          VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

/// A revision as handed to the watchers.
pub(super) struct Published {
    pub revision: Revision,
    /// `None`: too large, read it from the log.
    pub events: Option<Vec<Event>>,
}

/// Something that changes the store.
pub(super) enum Command {
    Txn {
        txn: Txn,
        reply: oneshot::Sender<Result<TxnOutcome>>,
    },
    Grant {
        lease: LeaseId,
        ttl_seconds: i64,
        reply: oneshot::Sender<Result<()>>,
    },
    /// `expired`: only if its time is really up.
    Revoke {
        lease: LeaseId,
        expired: bool,
        reply: oneshot::Sender<Result<()>>,
    },
    Compact {
        revision: Revision,
        reply: oneshot::Sender<Result<()>>,
    },
}

/// What to say once the group is durable.
enum Answer {
    Txn(oneshot::Sender<Result<TxnOutcome>>, Result<TxnOutcome>),
    Done(oneshot::Sender<Result<()>>, Result<()>),
}

/// Changes of memory that wait for the commit.
enum LeaseChange {
    Granted(LeaseId, Duration),
    Gone(LeaseId),
}

#[derive(Default)]
pub(super) struct AtomicCounters {
    pub durable_commits: AtomicU64,
    pub transactions: AtomicU64,
}

/// Opens the writer's connection anew.
pub(super) type Reopen = Box<dyn Fn() -> Result<Connection> + Send>;

pub(super) struct Core {
    pub conn: Connection,
    /// `None` in memory, where nothing is left of a connection that is closed.
    reopen: Option<Reopen>,
    revision: Revision,
    compact_revision: Revision,
    keep_revisions: u64,
    leases: Arc<Leases>,
    counters: Arc<AtomicCounters>,
    publish: broadcast::Sender<Arc<Published>>,
    /// Set when a commit failed in a way that leaves open what is on disk: nothing is believed until the database is
    /// opened again.
    poisoned: Option<String>,
}

/// The group being built.
struct Group {
    revision: Revision,
    compact_revision: Revision,
    wrote: bool,
    transactions: u64,
    published: Vec<Arc<Published>>,
    leases: Vec<LeaseChange>,
}

/// One transaction being applied.
struct Applying<'a> {
    conn: &'a Connection,
    revision: Revision,
    place: u64,
    events: Vec<Event>,
}

impl Core {
    pub fn new(
        conn: Connection,
        reopen: Option<Reopen>,
        keep_revisions: u64,
        leases: Arc<Leases>,
        counters: Arc<AtomicCounters>,
    ) -> Result<Core> {
        let revision = read::current_revision(&conn)?;
        let compact_revision = read::compact_revision(&conn)?;
        leases.replace(recorded_leases(&conn)?);
        let publish = broadcast::channel(PUBLISHED).0;
        let poisoned = None;
        Ok(Core {
            conn,
            reopen,
            revision,
            compact_revision,
            keep_revisions,
            leases,
            counters,
            publish,
            poisoned,
        })
    }

    pub fn publisher(&self) -> &broadcast::Sender<Arc<Published>> {
        &self.publish
    }

    /// Runs the commands in order, each with its own revision, commits them together, then answers.
    pub fn run(&mut self, commands: Vec<Command>) {
        if let Some(reason) = self.poisoned.clone()
            && let Err(error) = self.open_again(&reason)
        {
            commands.into_iter().for_each(|command| refuse(command, &error));
            return;
        }
        let mut group = Group {
            revision: self.revision,
            compact_revision: self.compact_revision,
            wrote: false,
            transactions: 0,
            published: Vec::new(),
            leases: Vec::new(),
        };
        if let Err(error) = self.conn.execute_batch("BEGIN IMMEDIATE") {
            let error = failed(error);
            commands.into_iter().for_each(|command| refuse(command, &error));
            return;
        }
        let mut answers = Vec::with_capacity(commands.len());
        let mut commands = commands.into_iter();
        for command in commands.by_ref() {
            match self.apply(&mut group, command) {
                Ok(answer) => answers.push(answer),
                Err((command_answer, error)) => {
                    // SQLite itself failed: nothing of this group is kept, so all of it is refused.
                    self.rollback();
                    let all = answers.into_iter().chain([command_answer]);
                    all.for_each(|answer| answer.fail(&error));
                    commands.for_each(|command| refuse(command, &error));
                    return;
                }
            }
        }
        if group.wrote
            && let Err(error) = self.compact_old(&mut group)
        {
            tracing::warn!(%error, "automatic compaction failed");
            self.rollback();
            answers.into_iter().for_each(|answer| answer.fail(&error));
            return;
        }
        self.finish(group, answers);
    }

    /// Commits and answers.
    fn finish(&mut self, group: Group, answers: Vec<Answer>) {
        if !group.wrote {
            self.rollback();
        } else if let Err(error) = self.conn.execute_batch("COMMIT") {
            // First: the next call of the system may change what the last one said.
            let full = read::is_full(&error);
            self.rollback();
            if full {
                // The frame that would have committed was not written.
                let error = StoreError::Full(error.to_string());
                answers.into_iter().for_each(|answer| answer.fail(&error));
            } else {
                // A failed fsync says nothing about what is on disk, and must not be tried again: the kernel
                // forgets which pages were dirty. Opening the database again decides.
                let reason = format!("a commit failed: {error}");
                tracing::error!(%error, "a commit failed; the store refuses changes until the database can be opened again");
                answers.into_iter().for_each(|answer| answer.unknown(&reason));
                self.poisoned = Some(reason);
            }
            return;
        } else {
            self.counters.durable_commits.fetch_add(1, Ordering::Relaxed);
            self.counters.transactions.fetch_add(group.transactions, Ordering::Relaxed);
            self.revision = group.revision;
            self.compact_revision = group.compact_revision;
            for change in group.leases {
                match change {
                    LeaseChange::Granted(lease, ttl) => self.leases.granted(lease, ttl),
                    LeaseChange::Gone(lease) => self.leases.gone(lease),
                }
            }
            for published in group.published {
                // Nobody is watching: fine.
                let _ = self.publish.send(published);
            }
        }
        answers.into_iter().for_each(Answer::send);
    }

    fn rollback(&mut self) {
        if !self.conn.is_autocommit()
            && let Err(error) = self.conn.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "a rollback failed; the database is opened again");
            self.poisoned = Some(format!("a rollback failed: {error}"));
        }
    }

    /// Opens the database again after a commit whose outcome is open, and makes it one of the two for good. Everything
    /// goes on from what is then there. Tried with each group of commands: who wants a change tries again anyway.
    fn open_again(&mut self, reason: &str) -> Result<()> {
        let Some(open) = &self.reopen else { return Err(StoreError::Unavailable(reason.to_owned())) };
        // The old one is closed first: it may hold locks.
        self.conn = Connection::open_in_memory().map_err(failed)?;
        let least = self.revision;
        let opened = open().and_then(|conn| {
            let (revision, compact_revision) = settle(&conn, least)?;
            let leases = recorded_leases(&conn)?;
            Ok((conn, revision, compact_revision, leases))
        });
        let (conn, revision, compact_revision, leases) = match opened {
            Ok(opened) => opened,
            Err(StoreError::Full(text)) => return Err(StoreError::Full(text)),
            Err(error) => {
                tracing::debug!(%error, "the database cannot be opened again yet");
                return Err(StoreError::Unavailable(format!("{reason}; opening it again: {error}")));
            }
        };
        self.conn = conn;
        self.leases.replace(leases);
        if revision > self.revision {
            // It was applied after all; whoever watches reads of it in the log. Nobody is watching: fine.
            let _ = self.publish.send(Arc::new(Published { revision, events: None }));
        }
        (self.revision, self.compact_revision) = (revision, compact_revision);
        self.poisoned = None;
        tracing::warn!(reason, "the database was opened again; changes are made again");
        Ok(())
    }

    /// `Err` only when SQLite failed; a refusal is an answer like others.
    fn apply(
        &self,
        group: &mut Group,
        command: Command,
    ) -> std::result::Result<Answer, (Answer, StoreError)> {
        match command {
            Command::Txn { txn, reply } => match self.apply_txn(group, txn) {
                Ok(result) => Ok(Answer::Txn(reply, result)),
                Err(error) => Err((Answer::Txn(reply, Ok(TxnOutcome::Unknown)), error)),
            },
            Command::Grant { lease, ttl_seconds, reply } => match self.apply_grant(group, lease, ttl_seconds)
            {
                Ok(()) => Ok(Answer::Done(reply, Ok(()))),
                Err(error) => Err((Answer::Done(reply, Ok(())), error)),
            },
            Command::Revoke { lease, expired, reply } => match self.apply_revoke(group, lease, expired) {
                Ok(result) => Ok(Answer::Done(reply, result)),
                Err(error) => Err((Answer::Done(reply, Ok(())), error)),
            },
            Command::Compact { revision, reply } => match self.apply_compact(group, revision) {
                Ok(result) => Ok(Answer::Done(reply, result)),
                Err(error) => Err((Answer::Done(reply, Ok(())), error)),
            },
        }
    }

    fn apply_txn(&self, group: &mut Group, txn: Txn) -> Result<Result<TxnOutcome>> {
        let mut holds = true;
        for compare in &txn.compares {
            let found = read::get(&self.conn, &compare.key)?;
            holds &= compare.holds(found.as_ref().map(|(_, kv)| kv));
        }
        let ops = if holds { txn.success } else { txn.failure };
        for op in &ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.lease_exists(*lease)?
            {
                return Ok(Err(StoreError::LeaseNotFound));
            }
        }
        let mut applying = Applying::new(&self.conn, group.revision + 1);
        let responses = ops.into_iter().map(|op| applying.op(op)).collect::<Result<Vec<_>>>()?;
        let wrote = group.add(applying);
        group.transactions += u64::from(wrote);
        let revision = group.revision;
        Ok(Ok(match holds {
            true => TxnOutcome::Committed { revision, responses },
            false => TxnOutcome::Refused { revision, responses },
        }))
    }

    fn lease_exists(&self, lease: LeaseId) -> Result<bool> {
        let mut statement = self.conn.prepare_cached("SELECT 1 FROM lease WHERE id = ?1").map_err(failed)?;
        statement.exists([lease.0]).map_err(failed)
    }

    fn apply_grant(&self, group: &mut Group, lease: LeaseId, ttl_seconds: i64) -> Result<()> {
        let mut statement = self.conn.prepare_cached("INSERT INTO lease VALUES (?1, ?2)").map_err(failed)?;
        statement.execute([lease.0, ttl_seconds]).map_err(failed)?;
        group.wrote = true;
        group.leases.push(LeaseChange::Granted(lease, Duration::from_secs(ttl_seconds as u64)));
        Ok(())
    }

    fn apply_revoke(&self, group: &mut Group, lease: LeaseId, expired: bool) -> Result<Result<()>> {
        if expired && !self.leases.is_expired(lease) {
            return Ok(Ok(())); // kept alive meanwhile
        }
        if !self.lease_exists(lease)? {
            return Ok(Err(StoreError::LeaseNotFound));
        }
        let keys: Vec<String> = {
            let sql = "SELECT key FROM live WHERE lease = ?1 AND lease != 0 ORDER BY key";
            let mut statement = self.conn.prepare_cached(sql).map_err(failed)?;
            let rows = statement
                .query_map([lease.0], |row| {
                    Ok(String::from_utf8_lossy(row.get_ref(0)?.as_blob()?).into_owned())
                })
                .map_err(failed)?;
            rows.collect::<rusqlite::Result<_>>().map_err(failed)?
        };
        let mut applying = Applying::new(&self.conn, group.revision + 1);
        for key in keys {
            applying.op(Op::Delete { key })?;
        }
        group.add(applying);
        let mut statement = self.conn.prepare_cached("DELETE FROM lease WHERE id = ?1").map_err(failed)?;
        statement.execute([lease.0]).map_err(failed)?;
        group.wrote = true;
        group.leases.push(LeaseChange::Gone(lease));
        Ok(Ok(()))
    }

    fn apply_compact(&self, group: &mut Group, revision: Revision) -> Result<Result<()>> {
        if revision <= group.compact_revision {
            return Ok(Err(StoreError::Compacted { compact_revision: group.compact_revision }));
        }
        if revision > group.revision {
            return Ok(Err(StoreError::FutureRevision { asked: revision, current: group.revision }));
        }
        self.compact_to(group, revision)?;
        Ok(Ok(()))
    }

    /// Keeps the last `keep_revisions`.
    fn compact_old(&self, group: &mut Group) -> Result<()> {
        let least =
            group.compact_revision + self.keep_revisions + COMPACT_STEP.min(self.keep_revisions.max(1));
        if self.keep_revisions == 0 || group.revision < least {
            return Ok(());
        }
        let target = (group.revision - self.keep_revisions).min(group.compact_revision + 2 * COMPACT_STEP);
        self.compact_to(group, target)
    }

    /// Everything that a change up to `revision` replaced goes, and so do the deletions themselves.
    fn compact_to(&self, group: &mut Group, revision: Revision) -> Result<()> {
        let first = read::log_id(group.compact_revision + 1, 0);
        let end = read::log_id(revision + 1, 0);
        let replaced = "DELETE FROM log WHERE id IN \
                        (SELECT prev FROM log WHERE id >= ?1 AND id < ?2 AND prev != 0)";
        let deletions = "DELETE FROM log WHERE id >= ?1 AND id < ?2 AND value IS NULL";
        for sql in [replaced, deletions] {
            let mut statement = self.conn.prepare_cached(sql).map_err(failed)?;
            statement.execute([first, end]).map_err(failed)?;
        }
        let sql = "UPDATE meta SET value = ?1 WHERE name = 'compact_revision'";
        let mut statement = self.conn.prepare_cached(sql).map_err(failed)?;
        statement.execute([revision as i64]).map_err(failed)?;
        group.compact_revision = revision;
        group.wrote = true;
        Ok(())
    }
}

/// Decides for good what a commit of unknown outcome has left: what the log holds goes into the database and the log is
/// emptied, so that no frame of that commit comes to life later; one more commit then makes this durable. Answers the
/// revision and the compacted one.
fn settle(conn: &Connection, least: Revision) -> Result<(Revision, Revision)> {
    let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
    let busy: bool = conn.query_row(sql, [], |row| row.get(0)).map_err(failed)?;
    if busy {
        return Err(StoreError::Unavailable("the log could not be emptied beside a reader".into()));
    }
    // Written also when nothing changes, unlike a row.
    let version = read::SCHEMA_VERSION;
    conn.execute_batch(&format!("BEGIN IMMEDIATE; PRAGMA user_version = {version}; COMMIT;"))
        .map_err(failed)?;
    let revision = read::current_revision(conn)?;
    if revision < least {
        return Err(StoreError::Unavailable(format!(
            "the database is at revision {revision}, and {least} was acknowledged"
        )));
    }
    Ok((revision, read::compact_revision(conn)?))
}

/// The leases of the table with their times to live. Nobody could keep them alive while the store was down, so their time
/// starts anew (as in etcd).
fn recorded_leases(conn: &Connection) -> Result<Vec<(LeaseId, Duration)>> {
    let mut statement = conn.prepare("SELECT id, ttl_seconds FROM lease").map_err(failed)?;
    let rows = statement
        .query_map([], |row| Ok((LeaseId(row.get(0)?), Duration::from_secs(row.get::<_, i64>(1)? as u64))))
        .map_err(failed)?;
    rows.collect::<rusqlite::Result<_>>().map_err(failed)
}

impl Group {
    /// Takes over a transaction's changes; says whether there were any.
    fn add(&mut self, applying: Applying<'_>) -> bool {
        if applying.events.is_empty() {
            return false;
        }
        let bytes: usize = applying.events.iter().map(event_bytes).sum();
        self.revision = applying.revision;
        self.wrote = true;
        let events = (bytes <= PUBLISHED_BYTES).then_some(applying.events);
        self.published.push(Arc::new(Published { revision: applying.revision, events }));
        true
    }
}

fn event_bytes(event: &Event) -> usize {
    event.key().len() + if let Change::Put(kv) = &event.change { kv.value.len() } else { 0 }
}

impl<'a> Applying<'a> {
    fn new(conn: &'a Connection, revision: Revision) -> Applying<'a> {
        Applying { conn, revision, place: 0, events: Vec::new() }
    }

    fn op(&mut self, op: Op) -> Result<OpResponse> {
        Ok(match op {
            Op::Get { key } => OpResponse::Got(read::get(self.conn, &key)?.map(|(_, kv)| kv)),
            Op::Put { key, value, lease } => {
                self.put(key, value, lease)?;
                OpResponse::Put
            }
            Op::Delete { key } => match read::get(self.conn, &key)? {
                Some((id, _)) => {
                    self.delete(key, id)?;
                    OpResponse::Deleted(1)
                }
                None => OpResponse::Deleted(0),
            },
            Op::DeleteRange { range } => {
                let keys = read::live_ids(self.conn, &range)?;
                let count = keys.len() as u64;
                for (id, key) in keys {
                    self.delete(key, id)?;
                }
                OpResponse::Deleted(count)
            }
        })
    }

    fn next_id(&mut self) -> Result<i64> {
        if self.place >= read::MAX_CHANGES {
            return Err(StoreError::Invalid("a transaction deletes more than a million keys".into()));
        }
        let id = read::log_id(self.revision, self.place);
        self.place += 1;
        Ok(id)
    }

    fn put(&mut self, key: String, value: bytes::Bytes, lease: Option<LeaseId>) -> Result<()> {
        let id = self.next_id()?;
        let old = read::get(self.conn, &key)?;
        let prev = old.as_ref().map_or(0, |(id, _)| *id);
        let create_revision = old.as_ref().map_or(self.revision, |(_, kv)| kv.create_revision);
        let version = old.as_ref().map_or(0, |(_, kv)| kv.version) + 1;
        let lease_number = lease.map_or(0, |lease| lease.0);
        let mut statement = self.conn.prepare_cached(INSERT_PUT).map_err(failed)?;
        statement
            .execute(params![
                id,
                key.as_bytes(),
                value.as_ref(),
                create_revision as i64,
                version as i64,
                lease_number,
                prev
            ])
            .map_err(failed)?;
        let sql = "INSERT INTO live VALUES (?1, ?2, ?3) \
                   ON CONFLICT (key) DO UPDATE SET id = excluded.id, lease = excluded.lease";
        let mut statement = self.conn.prepare_cached(sql).map_err(failed)?;
        statement.execute(params![key.as_bytes(), id, lease_number]).map_err(failed)?;
        let kv = KeyValue { key, value, create_revision, mod_revision: self.revision, version, lease };
        let prev_mod_revision = old.map(|(_, kv)| kv.mod_revision);
        self.events.push(Event { prev_mod_revision, change: Change::Put(kv) });
        Ok(())
    }

    fn delete(&mut self, key: String, prev: i64) -> Result<()> {
        let id = self.next_id()?;
        let sql =
            "INSERT INTO log (id, key, create_revision, version, lease, prev) VALUES (?1, ?2, 0, 0, 0, ?3)";
        let mut statement = self.conn.prepare_cached(sql).map_err(failed)?;
        statement.execute(params![id, key.as_bytes(), prev]).map_err(failed)?;
        let mut statement = self.conn.prepare_cached("DELETE FROM live WHERE key = ?1").map_err(failed)?;
        statement.execute([key.as_bytes()]).map_err(failed)?;
        let prev_mod_revision = Some(read::revision_of(prev));
        self.events.push(Event { prev_mod_revision, change: Change::Delete { key } });
        Ok(())
    }
}

/// Says that the command was not done.
fn refuse(command: Command, error: &StoreError) {
    match command {
        Command::Txn { reply, .. } => drop(reply.send(Err(error.clone()))),
        Command::Grant { reply, .. } | Command::Revoke { reply, .. } | Command::Compact { reply, .. } => {
            drop(reply.send(Err(error.clone())));
        }
    }
}

impl Answer {
    fn send(self) {
        // Whoever asked may have stopped waiting; what was done stays done.
        match self {
            Answer::Txn(reply, result) => drop(reply.send(result)),
            Answer::Done(reply, result) => drop(reply.send(result)),
        }
    }

    fn fail(self, error: &StoreError) {
        match self {
            Answer::Txn(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Done(reply, _) => drop(reply.send(Err(error.clone()))),
        }
    }

    fn unknown(self, reason: &str) {
        match self {
            // A refusal of a compare may rest on a change that is now in doubt, so it is in doubt as well.
            Answer::Txn(reply, _) => drop(reply.send(Ok(TxnOutcome::Unknown))),
            Answer::Done(reply, _) => drop(reply.send(Err(StoreError::Unavailable(reason.to_owned())))),
        }
    }
}
