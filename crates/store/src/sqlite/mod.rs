//! The store of a single host: SQLite in WAL mode with `synchronous=FULL`.
//!
//! All changes go through one writer thread. It takes whatever waits in its queue, runs each transaction with its own
//! revision, and commits the whole group with one wait for the disk; only then does anybody get an answer. Reads run
//! beside it on a few connections, each on a snapshot that contains all that was answered before.
//!
//! After a commit whose outcome is open (a failed fsync) nothing is believed: the writer closes its connection, and opens
//! the database again before the next change, for as long as the disk fails again and again.
//!
//! `:memory:` has neither thread nor pool: each call runs where it is polled. That makes it deterministic, which is
//! what [`karst_env::SeededEnv`] needs.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use karst_env::{EnvExt, SharedEnv};
use rusqlite::{Connection, OpenFlags, config::DbConfig};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::types::*;

mod core;
mod lease;
mod read;
mod watch;

use self::core::{AtomicCounters, Command, Core, Published, Reopen};
use self::lease::Leases;
use self::read::failed;

/// Commands that wait for the writer; whoever comes later waits to be let in.
const QUEUE: usize = 256;
/// Most commands that share a commit.
const GROUP: usize = 64;
/// Connections for reading.
const READERS: usize = 2;

/// How to open a store. The default is right for the daemon.
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    /// Revisions of history to keep for watchers and for reads at a revision; older ones are compacted by and by.
    /// 0: never compact by itself.
    pub keep_revisions: u64,
    /// Another of SQLite's file systems, by name. For tests that cut the power.
    pub vfs: Option<String>,
    /// Does not wait for the disk. For the test that shows that the test of durability notices.
    pub no_sync: bool,
}

impl Default for SqliteOptions {
    fn default() -> SqliteOptions {
        SqliteOptions { keep_revisions: 4096, vfs: None, no_sync: false }
    }
}

/// The store in a file or in memory. See the module's text.
pub struct SqliteStore {
    env: SharedEnv,
    commands: Option<Commands>,
    reads: Reads,
    publish: broadcast::WeakSender<Arc<Published>>,
    leases: Arc<Leases>,
    counters: Arc<AtomicCounters>,
    writer: Option<JoinHandle<()>>,
    /// Keeps other processes out. Released with the last of the store.
    _lock: Option<File>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").finish_non_exhaustive()
    }
}

/// The way to the writer.
#[derive(Clone)]
enum Commands {
    Queue(mpsc::Sender<Command>),
    Inline(Arc<Mutex<Core>>),
}

/// The same without keeping the writer alive.
enum WeakCommands {
    Queue(mpsc::WeakSender<Command>),
    Inline(Weak<Mutex<Core>>),
}

impl Commands {
    fn downgrade(&self) -> WeakCommands {
        match self {
            Commands::Queue(sender) => WeakCommands::Queue(sender.downgrade()),
            Commands::Inline(core) => WeakCommands::Inline(Arc::downgrade(core)),
        }
    }

    /// Hands it over if there is room.
    fn try_send(&self, command: Command) -> bool {
        match self {
            Commands::Queue(sender) => sender.try_send(command).is_ok(),
            Commands::Inline(core) => {
                core.lock().unwrap().run(vec![command]);
                true
            }
        }
    }

    /// Hands it over, waiting for room. An error means that it was not done.
    async fn send(&self, command: Command) -> Result<()> {
        match self {
            Commands::Queue(sender) => sender.send(command).await.map_err(|_| closed()),
            Commands::Inline(core) => {
                core.lock().unwrap().run(vec![command]);
                Ok(())
            }
        }
    }
}

impl WeakCommands {
    fn upgrade(&self) -> Option<Commands> {
        match self {
            WeakCommands::Queue(sender) => sender.upgrade().map(Commands::Queue),
            WeakCommands::Inline(core) => core.upgrade().map(Commands::Inline),
        }
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store was closed".into())
}

/// The way to read. Does not keep the writer alive.
#[derive(Clone)]
enum Reads {
    Pool(Arc<Pool>),
    Inline(Weak<Mutex<Core>>),
}

struct Pool {
    path: PathBuf,
    options: SqliteOptions,
    idle: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
}

impl Reads {
    /// Runs `body` on one snapshot.
    async fn run<T, F>(&self, body: F) -> Result<T>
    where
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        match self {
            Reads::Inline(core) => {
                let core = core.upgrade().ok_or_else(closed)?;
                let core = core.lock().unwrap();
                read::snapshot(&core.conn, body)
            }
            Reads::Pool(pool) => {
                let permit = pool.permits.clone().acquire_owned().await.map_err(|_| closed())?;
                let pool = pool.clone();
                let reading = tokio::task::spawn_blocking(move || {
                    let idle = pool.idle.lock().unwrap().pop();
                    let conn = match idle {
                        Some(conn) => conn,
                        None => connect(&pool.path, &pool.options, Role::Reader)?,
                    };
                    let result = read::snapshot(&conn, body);
                    pool.idle.lock().unwrap().push(conn);
                    drop(permit);
                    result
                });
                reading.await.map_err(|error| StoreError::Unavailable(format!("a read failed: {error}")))?
            }
        }
    }
}

#[derive(PartialEq)]
enum Role {
    Writer,
    Reader,
}

fn connect(path: &Path, options: &SqliteOptions, role: Role) -> Result<Connection> {
    let access = match role {
        Role::Writer => OpenFlags::SQLITE_OPEN_READ_WRITE,
        // A reader of a WAL writes its shared index, so it must be able to; `query_only` holds it back.
        Role::Reader => OpenFlags::SQLITE_OPEN_READ_WRITE,
    };
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = match &options.vfs {
        Some(vfs) => Connection::open_with_flags_and_vfs(path, flags, vfs.as_str()),
        None => Connection::open_with_flags(path, flags),
    }
    .map_err(failed)?;
    conn.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
    // Otherwise what is bound to a statement may change its plan, and it is compiled anew each time.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map_err(failed)?;
    conn.set_prepared_statement_cache_capacity(128);
    let (cache, extra) = match role {
        Role::Writer => (1024, ""),
        Role::Reader => (256, "PRAGMA query_only = ON;"),
    };
    let synchronous = if options.no_sync { "OFF" } else { "FULL" };
    conn.execute_batch(&format!(
        "PRAGMA cache_size = -{cache}; PRAGMA temp_store = MEMORY; PRAGMA synchronous = {synchronous}; \
         PRAGMA journal_size_limit = 16777216; {extra}"
    ))
    .map_err(failed)?;
    Ok(conn)
}

fn prepare_schema(conn: &Connection, path: &str) -> Result<()> {
    let version: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    match version {
        read::SCHEMA_VERSION => Ok(()),
        0 => {
            let set = format!("PRAGMA user_version = {};", read::SCHEMA_VERSION);
            conn.execute_batch(&format!("BEGIN IMMEDIATE; {} {set} COMMIT;", read::SCHEMA)).map_err(failed)
        }
        newer => Err(StoreError::Unavailable(format!(
            "{path} has tables of version {newer}, this program knows version {}",
            read::SCHEMA_VERSION
        ))),
    }
}

/// Creates what is missing and takes the lock.
fn open_file(path: &Path, options: &SqliteOptions) -> Result<(Connection, File)> {
    let io = |what: &str, error: std::io::Error| StoreError::Unavailable(format!("{what}: {error}"));
    let lock_path = path.with_extension("lock");
    let private = |path: &Path| {
        use std::os::unix::fs::OpenOptionsExt;
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    };
    let lock = private(&lock_path).map_err(|error| io("the lock file", error))?;
    lock.try_lock()
        .map_err(|_| StoreError::Unavailable(format!("{} is in use by another process", path.display())))?;
    // SQLite would create it readable for all; its companions inherit the mode.
    drop(private(path).map_err(|error| io("the database file", error))?);
    let conn = connect(path, options, Role::Writer)?;
    let mode: String = conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        return Err(StoreError::Unavailable(format!("SQLite uses journal mode {mode} instead of WAL")));
    }
    prepare_schema(&conn, &path.display().to_string())?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(|error| io("the directory", error))?;
    Ok((conn, lock))
}

impl SqliteStore {
    /// Opens or creates the store in the file `path` (with `-wal`, `-shm` and `.lock` beside it).
    /// Needs a tokio runtime. Only one process, and one handle, may have a file open.
    pub async fn open(
        path: impl Into<PathBuf>,
        env: SharedEnv,
        options: SqliteOptions,
    ) -> Result<SqliteStore> {
        let path = path.into();
        let leases = Arc::new(Leases::new(env.clone()));
        let counters = Arc::new(AtomicCounters::default());
        let (for_leases, for_counters) = (leases.clone(), counters.clone());
        let (for_path, for_options) = (path.clone(), options.clone());
        let opening = tokio::task::spawn_blocking(move || {
            let (conn, lock) = open_file(&for_path, &for_options)?;
            let keep_revisions = for_options.keep_revisions;
            let reopen: Reopen = Box::new(move || connect(&for_path, &for_options, Role::Writer));
            let core = Core::new(conn, Some(reopen), keep_revisions, for_leases, for_counters)?;
            Ok((core, lock))
        });
        let (mut core, lock) =
            opening.await.map_err(|error| StoreError::Unavailable(format!("opening failed: {error}")))??;
        let publish = core.publisher().downgrade();
        let (sender, mut receiver) = mpsc::channel::<Command>(QUEUE);
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .stack_size(512 * 1024)
            .spawn(move || {
                while let Some(first) = receiver.blocking_recv() {
                    let mut group = vec![first];
                    while group.len() < GROUP
                        && let Ok(next) = receiver.try_recv()
                    {
                        group.push(next);
                    }
                    core.run(group);
                }
            })
            .map_err(|error| StoreError::Unavailable(format!("no thread for the writer: {error}")))?;
        let permits = Arc::new(Semaphore::new(READERS));
        let reads = Reads::Pool(Arc::new(Pool { path, options, idle: Mutex::default(), permits }));
        let commands = Commands::Queue(sender);
        Ok(SqliteStore::start(env, commands, reads, publish, leases, counters, Some(writer), Some(lock)))
    }

    /// A store in memory that lives as long as the handle. Runs each call where it is polled, without threads.
    pub fn memory(env: SharedEnv) -> Result<SqliteStore> {
        SqliteStore::memory_with(env, SqliteOptions::default())
    }

    /// [`SqliteStore::memory`] with options.
    pub fn memory_with(env: SharedEnv, options: SqliteOptions) -> Result<SqliteStore> {
        let conn = Connection::open_in_memory().map_err(failed)?;
        conn.set_prepared_statement_cache_capacity(128);
        prepare_schema(&conn, ":memory:")?;
        let leases = Arc::new(Leases::new(env.clone()));
        let counters = Arc::new(AtomicCounters::default());
        let core = Core::new(conn, None, options.keep_revisions, leases.clone(), counters.clone())?;
        let publish = core.publisher().downgrade();
        let core = Arc::new(Mutex::new(core));
        let reads = Reads::Inline(Arc::downgrade(&core));
        Ok(SqliteStore::start(env, Commands::Inline(core), reads, publish, leases, counters, None, None))
    }

    #[allow(clippy::too_many_arguments)] // the parts of the struct, from two constructors
    fn start(
        env: SharedEnv,
        commands: Commands,
        reads: Reads,
        publish: broadcast::WeakSender<Arc<Published>>,
        leases: Arc<Leases>,
        counters: Arc<AtomicCounters>,
        writer: Option<JoinHandle<()>>,
        lock: Option<File>,
    ) -> SqliteStore {
        let (sweeping, weak, sweeper_env) = (leases.clone(), commands.downgrade(), env.clone());
        env.spawn_task("store-leases", async move {
            while let Some(expired) = sweeping.expired().await {
                for lease in expired {
                    let (reply, done) = oneshot::channel();
                    // The way to the writer is not held across an await: closing waits until nobody holds it.
                    match weak.upgrade() {
                        Some(commands)
                            if commands.try_send(Command::Revoke { lease, expired: true, reply }) => {}
                        Some(_) => {
                            sweeper_env.sleep(Duration::from_millis(50)).await;
                            continue; // the writer is busy; the next round finds the lease again
                        }
                        None => return,
                    }
                    match done.await {
                        Ok(Ok(())) | Ok(Err(StoreError::LeaseNotFound)) => {}
                        Ok(Err(error)) => {
                            // The disk may be full, or failed: the next round finds the lease again.
                            tracing::debug!(%error, "a lease that ended could not be removed yet");
                            sweeper_env.sleep(Duration::from_secs(1)).await;
                        }
                        Err(_) => return,
                    }
                }
            }
        });
        SqliteStore { env, commands: Some(commands), reads, publish, leases, counters, writer, _lock: lock }
    }

    async fn command<T>(&self, build: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<Option<T>> {
        let (reply, answer) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or_else(closed)?;
        commands.send(build(reply)).await?;
        // No answer: the writer died after it had taken the command.
        Ok(answer.await.ok())
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.leases.close();
        self.commands = None;
        if let Some(writer) = self.writer.take() {
            // It finishes the group that it is in and closes the file, so that the lock is free afterwards.
            if writer.join().is_err() {
                tracing::error!("the store's writer had panicked");
            }
        }
    }
}

fn died() -> StoreError {
    StoreError::Unavailable("the store's writer died".into())
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str) -> Result<GetResponse> {
        let key = key.to_owned();
        self.reads
            .run(move |conn| {
                let revision = read::current_revision(conn)?;
                Ok(GetResponse { kv: read::get(conn, &key)?.map(|(_, kv)| kv), revision })
            })
            .await
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        self.reads.run(move |conn| read::range(conn, &request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.validate()?;
        match self.command(|reply| Command::Txn { txn, reply }).await? {
            Some(result) => result,
            None => Ok(TxnOutcome::Unknown),
        }
    }

    async fn watch(&self, prefix: &str, from_revision: Revision) -> Result<WatchStream> {
        if from_revision == 0 {
            return Err(StoreError::Invalid("a watch starts at revision 1 or later".into()));
        }
        let receiver = self.publish.upgrade().ok_or_else(died)?.subscribe();
        Ok(watch::stream(self.reads.clone(), prefix, from_revision, receiver))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let ttl_seconds = lease_seconds(ttl)?;
        let lease = LeaseId((self.env.random_u64() >> 1).max(1) as i64);
        self.command(|reply| Command::Grant { lease, ttl_seconds, reply }).await?.ok_or_else(died)??;
        Ok(lease)
    }

    async fn lease_keepalive(&self, lease: LeaseId) -> Result<Duration> {
        self.leases.keepalive(lease).ok_or(StoreError::LeaseNotFound)
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.command(|reply| Command::Revoke { lease, expired: false, reply }).await?.ok_or_else(died)?
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        self.command(|reply| Command::Compact { revision, reply }).await?.ok_or_else(died)?
    }

    async fn status(&self) -> Result<Status> {
        let backend = if self.writer.is_some() { "sqlite" } else { "sqlite-memory" };
        self.reads
            .run(move |conn| {
                let sql = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()";
                let size: i64 = conn.query_row(sql, [], |row| row.get(0)).map_err(failed)?;
                Ok(Status {
                    backend,
                    version: rusqlite::version().to_owned(),
                    revision: read::current_revision(conn)?,
                    compact_revision: read::compact_revision(conn)?,
                    size_bytes: size as u64,
                })
            })
            .await
    }

    fn counters(&self) -> Counters {
        Counters {
            durable_commits: self.counters.durable_commits.load(Ordering::Relaxed),
            transactions: self.counters.transactions.load(Ordering::Relaxed),
        }
    }
}
