//! What is done with a running guest: exec, console, files.

use crate::{Engine, EngineInner, InstanceView, context::Context, events::context_of};
use karst_agent::{
    CallContext, ConsoleAttach, ConsoleLog, ExecStart, FileOpened, FileRef, FileWriteRequest, GuestAsk,
    GuestRef, HostAgent, KeyPresses, PortAttach, SessionResize, SessionSignal, VolumeRef,
};
use karst_env::EnvExt;
use karst_model::{
    Error, ErrorKind, InstanceId, NodeId, Result, SessionId,
    access::Permission,
    display::DisplayProtocol,
    guest::{AskedBy, ExecRequest, FileKind, FileWrite, GuestWish},
    instance::{InstanceKind, Status},
    keys,
    news::Happened,
};
use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const CALL: Duration = Duration::from_secs(60);
/// A session may live long; its calls are still bounded.
const SESSION: Duration = Duration::from_secs(30 * 24 * 3600);

/// A session on a guest. Dropping it ends the program or detaches the console. The host keeps one that is over until it is
/// closed, with what leads to the guest, so that is done of each.
pub struct Session {
    agent: Arc<dyn HostAgent>,
    id: SessionId,
    env: Arc<dyn karst_env::Env>,
    closed: AtomicBool,
    /// Told when it is over.
    _farewell: Option<Farewell>,
}

/// Tells of the end of a session when it is dropped.
struct Farewell {
    engine: Weak<EngineInner>,
    instance: InstanceId,
    what: Happened,
    requestor: String,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.upgrade() {
            let (what, requestor) = (&self.what, std::mem::take(&mut self.requestor));
            engine.tell_of(self.instance, what.action(), None, context_of(what), requestor);
        }
    }
}

/// A running exec.
pub struct ExecSession {
    /// One descriptor (terminal), or stdin, stdout, stderr.
    pub fds: Vec<OwnedFd>,
    /// Control.
    pub session: Session,
}

impl Session {
    /// New size of the terminal.
    ///
    /// # Errors
    /// Not found when it has ended.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.agent
            .session_resize(&CallContext::read(CALL), SessionResize { session: self.id, columns, rows })
            .await
    }

    /// A signal to the program.
    ///
    /// # Errors
    /// Not found when it has ended.
    pub async fn signal(&self, signal: i32) -> Result<()> {
        self.agent.session_signal(&CallContext::read(CALL), SessionSignal { session: self.id, signal }).await
    }

    /// Waits for the end. What was written until then can still be read, as long as this is not dropped.
    ///
    /// # Errors
    /// Unavailable when the host went away.
    pub async fn wait(&self) -> Result<i32> {
        self.agent.session_wait(&CallContext::read(SESSION), self.id).await
    }

    /// Ends it, and answers when it has ended.
    pub async fn close(self) {
        // A host that is gone has ended it itself.
        if self.agent.session_close(&CallContext::read(CALL), self.id).await.is_ok() {
            self.closed.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::Relaxed) {
            let (agent, id) = (self.agent.clone(), self.id);
            // Not waited for: a host that is gone has ended the session itself.
            self.env.spawn(
                "session-close",
                Box::pin(async move {
                    let _ = agent.session_close(&CallContext::read(CALL), id).await;
                }),
            );
        }
    }
}

/// A file that was opened for reading.
pub struct OpenFile {
    /// What it is.
    pub opened: FileOpened,
    /// Content of a regular file.
    pub content: Option<OwnedFd>,
}

/// Demands a path that can be one inside.
pub(crate) fn check_file_path(path: &str) -> Result<()> {
    if path.len() > 4096 {
        return Err(Error::invalid("path", "the path is longer than 4096 bytes"));
    }
    if !path.starts_with('/') || path.contains('\0') {
        return Err(Error::invalid("path", format!("{path:?} is not an absolute path")));
    }
    Ok(())
}

/// Demands that it can be written so.
pub(crate) fn check_write(write: &FileWrite) -> Result<()> {
    if write.mode.is_some_and(|m| m > 0o7777) {
        return Err(Error::invalid("mode", "permission bits are at most 07777"));
    }
    if write.kind == FileKind::Symlink && write.target.as_deref().unwrap_or_default().is_empty() {
        return Err(Error::invalid("target", "a symbolic link needs a target"));
    }
    Ok(())
}

/// A regular file that is being written.
pub struct FileUpload {
    /// Where the content goes; close it at the end.
    pub sink: Option<OwnedFd>,
    session: Option<Session>,
}

impl FileUpload {
    pub(crate) fn new(sink: Option<OwnedFd>, session: Option<Session>) -> Self {
        Self { sink, session }
    }

    /// After the sink was closed: waits until the file is whole.
    ///
    /// # Errors
    /// Those of the guest: no space, no such directory.
    pub async fn finish(mut self) -> Result<()> {
        self.end().await
    }

    /// What the guest says after its end of the sink was closed while there was more to write.
    pub async fn failure(&mut self) -> Error {
        let broken = Error::unavailable("the guest no longer takes the file's content");
        self.end().await.err().unwrap_or(broken)
    }

    /// Gives it up: what is there stays as it was. The guest must not take the end of the stream for the end of the file, so
    /// whatever else leads to the sink is closed after this.
    pub async fn abandon(mut self) {
        if let Some(session) = self.session.take() {
            session.close().await;
        }
    }

    async fn end(&mut self) -> Result<()> {
        drop(self.sink.take());
        match self.session.take() {
            None => Ok(()),
            Some(session) => match session.wait().await? {
                0 => Ok(()),
                code => Err(Error::internal("the file could not be written", format!("exit code {code}"))),
            },
        }
    }
}

fn demand_machine(view: &InstanceView) -> Result<()> {
    if view.instance.kind != InstanceKind::VirtualMachine {
        return Err(Error::unsupported(format!(
            "instance {:?} is a container; only virtual machines have a screen, a keyboard and a reset button",
            &*view.instance.name
        )));
    }
    Ok(())
}

impl EngineInner {
    /// Tells a host that a process will enter a guest's groups in a moment; nobody waits for that.
    pub(crate) fn expect_entry(&self, node: NodeId) {
        let Ok(agent) = self.agents.get(node) else { return };
        self.env.spawn_task("entry-expected", async move {
            // A hint: without it the host waits for its kernel when the process comes.
            let _ = agent.entry_expected(&CallContext::read(Duration::from_secs(1)), ()).await;
        });
    }
}

impl Engine {
    fn running(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<(Arc<InstanceView>, Arc<dyn HostAgent>)> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        match view.status {
            Status::Running => {}
            Status::Frozen => {
                return Err(Error::conflict(format!("instance {name:?} is frozen; resume it first")));
            }
            Status::Error => {
                return Err(Error::conflict(format!(
                    "instance {name:?} is halted by an error; resume it when the cause is gone"
                )));
            }
            _ => {
                return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
            }
        }
        let agent = self.inner().agents.get(view.instance.node)?;
        Ok((view, agent))
    }

    /// Checks that a program could be run now, before a client connects its streams.
    ///
    /// # Errors
    /// Not found, conflict when it does not run, invalid request, forbidden.
    pub fn exec_check(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: &ExecRequest,
    ) -> Result<Arc<InstanceView>> {
        let (view, _) = self.running(context, project, name)?;
        if request.command.is_empty() || request.command[0].is_empty() {
            return Err(Error::invalid("command", "the command is empty"));
        }
        if request.command.iter().any(|a| a.contains('\0')) {
            return Err(Error::invalid("command", "an argument contains a NUL byte"));
        }
        for (k, v) in &request.environment {
            if k.is_empty() || k.contains(['=', '\0']) || v.contains('\0') {
                return Err(Error::invalid(
                    format!("environment.{k}"),
                    "a variable's name must not be empty or contain '=' or NUL",
                ));
            }
        }
        if request.cwd.as_ref().is_some_and(|c| !c.starts_with('/') || c.contains('\0')) {
            return Err(Error::invalid("cwd", "the working directory must be an absolute path"));
        }
        Ok(view)
    }

    /// Lets the host prepare for a program that [`Engine::exec`] will run once its streams are connected.
    pub fn exec_expected(&self, view: &InstanceView) {
        self.inner().expect_entry(view.instance.node);
    }

    /// The same for whatever a client will do that says hello or begins to listen to events: those that change something do
    /// so first, and the wait is over when they come to it. Of several hosts nobody knows which one it will be.
    pub fn change_expected(&self) {
        if let [node] = self.inner().agents.nodes()[..] {
            self.inner().expect_entry(node);
        }
    }

    /// Runs a program in a running guest.
    ///
    /// # Errors
    /// Those of [`Engine::exec_check`] and of the guest.
    pub async fn exec(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        mut request: ExecRequest,
    ) -> Result<ExecSession> {
        let view = self.exec_check(context, project, name, &request)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        // What the user says wins over environment.*, which wins over the defaults of a login.
        let mut environment = std::collections::BTreeMap::from([
            ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ]);
        if request.uid == 0 {
            environment.insert("HOME".into(), "/root".into());
            environment.insert("USER".into(), "root".into());
        }
        environment.extend(keys::environment(&view.expanded_config));
        environment.append(&mut request.environment);
        if let Some(term) = environment.get("TERM") {
            request.term = Some(term.clone());
        } else if request.terminal.is_some() {
            environment.insert("TERM".into(), request.term.clone().unwrap_or_else(|| "xterm".into()));
        }
        request.environment = environment;
        let start = ExecStart { instance: view.instance.id, request };
        let answer = agent.exec_start(&CallContext::read(CALL), start).await?;
        Ok(ExecSession { fds: answer.fds, session: self.session(agent, answer.value) })
    }

    pub(crate) fn session(&self, agent: Arc<dyn HostAgent>, id: SessionId) -> Session {
        Session { agent, id, env: self.inner().env.clone(), closed: AtomicBool::new(false), _farewell: None }
    }

    /// The session of somebody who looks at a display, which is told, and its end as well.
    pub(crate) fn viewer(
        &self,
        viewer: String,
        view: &InstanceView,
        (protocol, guarded): (DisplayProtocol, bool),
        (agent, id): (Arc<dyn HostAgent>, SessionId),
    ) -> Session {
        let what = |opened| Happened::Display { opened, protocol, guarded, viewer: viewer.clone() };
        let (instance, opened) = (view.instance.id, what(true));
        let inner = self.inner();
        inner.tell_of(instance, opened.action(), None, context_of(&opened), viewer.clone());
        let farewell = Farewell {
            engine: Arc::downgrade(inner),
            instance,
            what: what(false),
            requestor: viewer.clone(),
        };
        let mut session = self.session(agent, id);
        session._farewell = Some(farewell);
        session
    }

    /// Attaches to the console of a running guest: one descriptor, both ways.
    ///
    /// # Errors
    /// Not found, conflict when it does not run or somebody is attached (unless `force`), forbidden.
    pub async fn console(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        force: bool,
    ) -> Result<ExecSession> {
        let (view, agent) = self.running(context, project, name)?;
        let attach = ConsoleAttach { instance: view.instance.id, force };
        let answer = agent.console_attach(&CallContext::read(CALL), attach).await?;
        Ok(ExecSession { fds: answer.fds, session: self.session(agent, answer.value) })
    }

    /// Attaches to a port of a running virtual machine (a device of type `port`) that leads to who attaches: one descriptor,
    /// both ways.
    ///
    /// # Errors
    /// Not found, also without such a port since its start; conflict when it does not run or somebody is attached (unless `force`);
    /// unsupported for a port that leads elsewhere, and for containers; forbidden.
    pub async fn machine_port(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        port: &str,
        force: bool,
    ) -> Result<ExecSession> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let attach = PortAttach { instance: view.instance.id, port: port.to_owned(), force };
        let answer = agent.port_attach(&CallContext::read(CALL), attach).await?;
        Ok(ExecSession { fds: answer.fds, session: self.session(agent, answer.value) })
    }

    pub(crate) fn virtual_machine(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<(Arc<InstanceView>, Arc<dyn HostAgent>)> {
        let found = self.running(context, project, name)?;
        demand_machine(&found.0)?;
        Ok(found)
    }

    /// A guest that has a process, whatever it does.
    pub(super) fn active(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<(GuestRef, Arc<InstanceView>, Arc<dyn HostAgent>)> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        if view.status == Status::Stopped {
            return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
        }
        let agent = self.inner().agents.get(view.instance.node)?;
        let generation = view.runtime.as_ref().map_or(view.instance.generation, |r| r.generation);
        Ok((GuestRef { instance: view.instance.id, generation }, view, agent))
    }

    /// Asks a guest that has a process to shut down or to boot anew, and answers when it was asked: what it makes of that is its
    /// own affair, and nothing waits for it or is held by it. Each call asks again.
    ///
    /// # Errors
    /// Not found, conflict when it does not run, unsupported for a container that is to boot anew or to be asked by an agent,
    /// unavailable when the agent that is to be asked is not there, forbidden.
    pub async fn instance_ask(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        wish: GuestWish,
        by: AskedBy,
    ) -> Result<()> {
        let (guest, _, agent) = self.active(context, project, name)?;
        agent.guest_ask(&CallContext::read(CALL), GuestAsk { guest, wish, by }).await
    }

    /// Presses the reset button of a virtual machine that has a process; one that stands still goes on doing so.
    ///
    /// # Errors
    /// Not found, conflict when it does not run, unsupported for a container, forbidden.
    pub async fn machine_reset(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let (guest, view, agent) = self.active(context, project, name)?;
        demand_machine(&view)?;
        agent.guest_reset(&CallContext::read(CALL), guest).await
    }

    /// Presses keys of a running virtual machine, each a chord such as `ctrl-alt-delete`.
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`], and invalid for an unknown key.
    pub async fn machine_keys(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        keys: &[String],
    ) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let chords = karst_model::keyboard::chords(keys)?;
        let request = KeyPresses { instance: view.instance.id, chords };
        agent.guest_keys(&CallContext::read(CALL), request).await
    }

    /// What a running virtual machine shows, as a PNG file.
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`], and unsupported for a machine without a display.
    pub async fn machine_screenshot(&self, context: &Context, project: &str, name: &str) -> Result<OwnedFd> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let answer = agent.guest_screenshot(&CallContext::read(CALL), view.instance.id).await?;
        answer
            .fds
            .into_iter()
            .next()
            .ok_or_else(|| Error::internal("there is no screenshot", "no descriptor"))
    }

    /// The kept console log, newest at the end; `clear` empties it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn console_log(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        clear: bool,
    ) -> Result<Vec<u8>> {
        let permission = if clear { Permission::ResourceEdit } else { Permission::InstanceUse };
        let view = self.find(context, project, name, permission)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        let request = ConsoleLog { instance: view.instance.id, max: 1 << 20, clear, runner: false };
        agent.console_log(&CallContext::read(CALL), request).await
    }

    /// What the program that runs an instance said since its last start, newest at the end, without places of the host; empty of
    /// one that never ran. `clear` empties it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn instance_log(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        clear: bool,
    ) -> Result<Vec<u8>> {
        let permission = if clear { Permission::ResourceEdit } else { Permission::InstanceUse };
        let view = self.find(context, project, name, permission)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        let request = ConsoleLog { instance: view.instance.id, max: 1 << 20, clear, runner: true };
        match agent.console_log(&CallContext::read(CALL), request).await {
            // The host has not heard of it yet.
            Err(e) if e.is(ErrorKind::NotFound) => Ok(vec![]),
            other => other,
        }
    }

    fn file_ref(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        path: &str,
    ) -> Result<(FileRef, Arc<dyn HostAgent>)> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        check_file_path(path)?;
        if view.instance.kind == InstanceKind::VirtualMachine && view.status != Status::Running {
            return Err(Error::conflict(format!(
                "files of the virtual machine {name:?} can be reached only while it runs"
            )));
        }
        let root = VolumeRef { pool: view.instance.pool, volume: view.instance.root };
        let file =
            FileRef { instance: view.instance.id, kind: view.instance.kind, root, path: path.to_owned() };
        Ok((file, self.inner().agents.get(view.instance.node)?))
    }

    /// Opens a file of a guest.
    ///
    /// # Errors
    /// Not found, invalid path, forbidden.
    pub async fn file_open(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        path: &str,
    ) -> Result<OpenFile> {
        let (file, agent) = self.file_ref(context, project, name, path)?;
        let answer = agent.file_open(&CallContext::read(CALL), file).await?;
        Ok(OpenFile { opened: answer.value, content: answer.fds.into_iter().next() })
    }

    /// Writes a file, directory or link in a guest. For a regular file the content goes into the answer's sink.
    ///
    /// # Errors
    /// Not found, invalid path or mode, forbidden.
    pub async fn file_write(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        write: FileWrite,
    ) -> Result<FileUpload> {
        check_write(&write)?;
        let (file, agent) = self.file_ref(context, project, name, &write.path)?;
        let answer = agent.file_write(&CallContext::read(CALL), FileWriteRequest { file, write }).await?;
        let session = answer.value.map(|id| self.session(agent, id));
        Ok(FileUpload::new(answer.fds.into_iter().next(), session))
    }

    /// Deletes a file or an empty directory of a guest.
    ///
    /// # Errors
    /// Not found, invalid path, forbidden.
    pub async fn file_delete(&self, context: &Context, project: &str, name: &str, path: &str) -> Result<()> {
        let (file, agent) = self.file_ref(context, project, name, path)?;
        agent.file_delete(&CallContext::read(CALL), file).await
    }
}
