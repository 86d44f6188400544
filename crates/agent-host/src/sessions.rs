//! Open sessions: programs that run in guests, consoles, files being written. Bounded; ended when control closes them, when
//! its connection ends, or when the guest does.

use karst_env::{Mutex, SharedEnv};
use karst_guest::{Exec, ExecControl, ExecStreams, GuestDriver};
use karst_model::{Error, InstanceId, Result, SessionId};
use rustix::net::Shutdown;
use std::{collections::BTreeMap, future::Future, os::fd::OwnedFd, sync::Arc};
use tokio::sync::watch;

/// Sessions of a host at a time, ended ones that nobody has closed included.
const LIMIT: usize = 1024;

type Outcome = Option<Result<i32>>;

/// One session.
pub(crate) struct Session {
    pub instance: InstanceId,
    kind: Kind,
    outcome: watch::Sender<Outcome>,
    task: Mutex<Option<tokio::task::AbortHandle>>,
}

enum Kind {
    Exec(Arc<dyn ExecControl>),
    /// A second descriptor of the stream, to cut it off, and who knows its terminal.
    Console(OwnedFd, Arc<dyn GuestDriver>),
    /// The same of a screen, which has no terminal.
    Display(OwnedFd),
    /// The same of a port, with the name of its device.
    Port(OwnedFd, String),
    FileWrite,
}

impl Session {
    /// Waits for its end.
    pub async fn wait(&self) -> Result<i32> {
        let mut outcome = self.outcome.subscribe();
        match outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(outcome)) => outcome.clone(),
            _ => Err(Error::not_found("the session is over")),
        }
    }

    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        match &self.kind {
            Kind::Exec(control) => control.resize(columns, rows).await,
            Kind::Console(_, driver) => driver.console_resize(self.instance, columns, rows).await,
            Kind::Display(_) | Kind::Port(..) | Kind::FileWrite => {
                Err(Error::unsupported("only a program with a terminal has a size"))
            }
        }
    }

    pub async fn signal(&self, signal: i32) -> Result<()> {
        match &self.kind {
            Kind::Exec(control) => control.signal(signal).await,
            _ => Err(Error::unsupported("only programs take signals")),
        }
    }

    fn is_console(&self) -> bool {
        matches!(self.kind, Kind::Console(..) | Kind::Display(_) | Kind::Port(..))
    }

    fn ended(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    fn end(&self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
        if let Kind::Console(stream, _) | Kind::Display(stream) | Kind::Port(stream, _) = &self.kind {
            // A terminal's master cannot be shut down; closing ours is all there is to do then.
            let _ = rustix::net::shutdown(stream, Shutdown::Both);
        }
        self.outcome.send_if_modified(|outcome| {
            let open = outcome.is_none();
            if open {
                *outcome = Some(Ok(if self.is_console() { 0 } else { 137 }));
            }
            open
        });
    }
}

/// The table.
pub(crate) struct Sessions {
    env: SharedEnv,
    open: Mutex<BTreeMap<SessionId, Arc<Session>>>,
}

impl Sessions {
    pub fn new(env: SharedEnv) -> Self {
        Self { env, open: Mutex::default() }
    }

    pub fn get(&self, id: SessionId) -> Result<Arc<Session>> {
        let found = self.open.lock().get(&id).cloned();
        found.ok_or_else(|| Error::not_found(format!("session {id} is over")))
    }

    /// Sessions that go on.
    pub fn count(&self) -> usize {
        self.open.lock().values().filter(|s| !s.ended()).count()
    }

    /// Is there room for one more? Asked before a program is started for nothing.
    pub fn room(&self) -> Result<()> {
        let mut open = self.open.lock();
        if open.len() >= LIMIT {
            open.retain(|_, s| !s.ended());
        }
        if open.len() >= LIMIT {
            return Err(Error::unavailable("the host has too many open sessions; close some"));
        }
        Ok(())
    }

    fn add(&self, instance: InstanceId, kind: Kind) -> (SessionId, Arc<Session>) {
        let id = SessionId(self.env.uuid());
        let session =
            Arc::new(Session { instance, kind, outcome: watch::Sender::new(None), task: Mutex::default() });
        self.open.lock().insert(id, session.clone());
        (id, session)
    }

    /// A program that runs.
    pub fn exec(&self, instance: InstanceId, exec: Exec) -> (SessionId, Vec<OwnedFd>) {
        let fds = match exec.streams {
            ExecStreams::Terminal(fd) => vec![fd],
            ExecStreams::Pipes { stdin, stdout, stderr } => vec![stdin, stdout, stderr],
        };
        let control: Arc<dyn ExecControl> = exec.control.into();
        let (id, session) = self.add(instance, Kind::Exec(control.clone()));
        self.watch(&session, async move { control.wait().await });
        (id, fds)
    }

    /// A console of a driver's guest that is attached.
    pub fn console(
        &self,
        instance: InstanceId,
        stream: OwnedFd,
        driver: Arc<dyn GuestDriver>,
    ) -> Result<(SessionId, OwnedFd)> {
        let ours = stream.try_clone()?;
        let (id, _) = self.add(instance, Kind::Console(ours, driver));
        Ok((id, stream))
    }

    /// A screen that is attached.
    pub fn display(&self, instance: InstanceId, stream: OwnedFd) -> Result<(SessionId, OwnedFd)> {
        let ours = stream.try_clone()?;
        let (id, _) = self.add(instance, Kind::Display(ours));
        Ok((id, stream))
    }

    /// Ends who is attached to a port, if `force`; answers whether nobody is.
    pub fn leave_port(&self, instance: InstanceId, port: &str, force: bool) -> bool {
        let of = |s: &&Arc<Session>| {
            let same = matches!(&s.kind, Kind::Port(_, name) if name == port);
            same && s.instance == instance && !s.ended()
        };
        let attached: Vec<_> = self.open.lock().values().filter(of).cloned().collect();
        if force {
            attached.iter().for_each(|session| session.end());
        }
        force || attached.is_empty()
    }

    /// A port that is attached to.
    pub fn port(&self, instance: InstanceId, port: String, stream: OwnedFd) -> Result<(SessionId, OwnedFd)> {
        let ours = stream.try_clone()?;
        let (id, _) = self.add(instance, Kind::Port(ours, port));
        Ok((id, stream))
    }

    /// A file that is being written by `work`.
    pub fn file_write(
        &self,
        instance: InstanceId,
        work: impl Future<Output = Result<()>> + Send + 'static,
    ) -> SessionId {
        let (id, session) = self.add(instance, Kind::FileWrite);
        self.watch(&session, async move { work.await.map(|()| 0) });
        id
    }

    /// A volume that is being streamed by `work`; of no guest.
    pub fn transfer(&self, work: impl Future<Output = Result<()>> + Send + 'static) -> SessionId {
        self.file_write(crate::storage::NOBODY, work)
    }

    fn watch(&self, session: &Arc<Session>, end: impl Future<Output = Result<i32>> + Send + 'static) {
        let weak = Arc::downgrade(session);
        let task = tokio::spawn(async move {
            let outcome = end.await;
            if let Some(session) = weak.upgrade() {
                session.outcome.send_replace(Some(outcome));
            }
        });
        *session.task.lock() = Some(task.abort_handle());
    }

    /// Ends and forgets one; an unknown one is over already.
    pub async fn close(&self, id: SessionId) {
        let session = self.open.lock().remove(&id);
        if let Some(session) = session {
            let task = session.task.lock().clone();
            session.end();
            // What it did with a file is over, before anybody closes the stream and that looks like the file's end.
            for _ in 0..1000 {
                if task.as_ref().is_none_or(|task| task.is_finished()) {
                    break;
                }
                self.env.sleep(std::time::Duration::from_millis(1)).await;
            }
        }
    }

    /// The guest ended: so do its sessions. They stay until they are closed, so that waiters learn of it.
    pub fn guest_ended(&self, instance: InstanceId) {
        let of: Vec<_> = self.open.lock().values().filter(|s| s.instance == instance).cloned().collect();
        for session in of {
            if session.is_console() {
                session.end();
            }
        }
    }
}
