//! The keeper's helper for things inside: starts it, passes descriptors, reads its reply.

use crate::{driver::Running, proc::Init};
use async_trait::async_trait;
use karst_guest::{Exec, ExecControl, ExecRequest, ExecStreams, packet::PacketSocket};
use karst_keeper::{
    attach::{Operation, Request, SIGNAL},
    protocol as p,
};
use karst_model::{Error, ErrorKind, Result};
use rustix::{
    fs::{Gid, MemfdFlags, Uid, fchown, memfd_create},
    pipe::{PipeFlags, pipe_with},
    termios::{Winsize, tcsetwinsize},
};
use std::{ffi::OsString, io::Write, os::fd::OwnedFd, time::Duration};
use tokio::{sync::Mutex, task::JoinHandle};

/// How long the helper may take to answer.
const ANSWER: Duration = Duration::from_secs(15);
/// What programs find when nobody says otherwise.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A helper at work.
pub(crate) struct Helper {
    socket: PacketSocket,
    /// Killed with the helper unless released.
    process: Option<JoinHandle<()>>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.abort();
        }
    }
}

/// A reply: the body and a descriptor.
pub(crate) type Reply = (Vec<u8>, Option<OwnedFd>);

impl Helper {
    /// Starts one with a request. `subject` is the pidfd of init, or the root directory of a stopped container.
    pub(crate) async fn start(
        daemon_id: &str,
        instance: &str,
        request: &Request,
        subject: OwnedFd,
        rest: Vec<OwnedFd>,
    ) -> Result<Self> {
        let memory = memfd_create("karst-attach", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let mut file = std::fs::File::from(memory);
        file.write_all(&request.render())?;
        let (socket, theirs) = PacketSocket::pair()?;
        let mut fds: Vec<OwnedFd> = vec![file.into(), subject];
        fds.extend(rest);
        socket.send(&[p::LAUNCH], &fds).await?;
        drop(fds);
        let command = karst_host::run(karst_host::Program::Keeper)
            .args(["--attach", "--daemon", daemon_id, "--instance", instance])
            .stdin_fd(theirs)
            .timeout(Duration::from_secs(u32::MAX as u64));
        let process = tokio::spawn(async move {
            if let Err(e) = command.output().await {
                tracing::warn!(error = %e, context = e.context.as_deref(), "helper");
            }
        });
        Ok(Self { socket, process: Some(process) })
    }

    /// Lets it end by itself: it does when its program ends, or when it loses us and has killed its program, or when it
    /// has written all of a file into the pipe.
    pub(crate) fn release(&mut self) {
        self.process = None;
    }

    /// Its reply.
    pub(crate) async fn reply(&self) -> Result<Reply> {
        self.reply_within(ANSWER).await
    }

    /// Its reply, when that may take longer.
    pub(crate) async fn reply_within(&self, time: Duration) -> Result<Reply> {
        let packet = tokio::time::timeout(time, self.socket.receive(p::MAX))
            .await
            .map_err(|_| Error::timeout("the guest did not answer in time"))??;
        match packet {
            Some((packet, fd)) => match packet.as_slice() {
                [_, p::code::OK, body @ ..] => Ok((body.to_vec(), fd)),
                [_, _, a, b, c, d, text @ ..] => {
                    Err(failure(i32::from_le_bytes([*a, *b, *c, *d]), &String::from_utf8_lossy(text)))
                }
                _ => Err(Error::internal("the guest could not be entered", "malformed reply")),
            },
            None => Err(Error::internal("the guest could not be entered", "its helper died")),
        }
    }
}

/// The error of a failed step inside.
fn failure(number: i32, text: &str) -> Error {
    let what = text.split(": ").next().unwrap_or("").to_owned();
    let words = std::io::Error::from_raw_os_error(number).to_string();
    let words = words.split(" (os error").next().unwrap_or("");
    let kind = match number {
        libc::ENOENT => ErrorKind::NotFound,
        libc::EEXIST | libc::ENOTEMPTY | libc::EBUSY | libc::ETXTBSY => ErrorKind::Conflict,
        libc::ENOTDIR | libc::EISDIR | libc::ELOOP | libc::EINVAL | libc::ENAMETOOLONG | libc::EXDEV => {
            ErrorKind::Invalid
        }
        libc::EACCES | libc::EPERM | libc::EROFS | libc::EOVERFLOW => ErrorKind::Forbidden,
        libc::ENOSPC | libc::EDQUOT => ErrorKind::Quota,
        libc::EOPNOTSUPP | libc::ENXIO | libc::ENODEV => ErrorKind::Unsupported,
        libc::ESRCH => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    let mut e = Error::new(kind, format!("{what}: {words}"));
    if what == "working directory" {
        e.kind = ErrorKind::Invalid;
        e.field = Some("cwd".into());
    }
    e.with_context(text)
}

/// Runs a program inside.
pub(crate) async fn exec(running: &Running, init: Init, request: ExecRequest) -> Result<Exec> {
    if request.command.is_empty() {
        return Err(Error::invalid("command", "must name a program"));
    }
    if let Some(bad) = request.environment.keys().find(|k| k.is_empty() || k.contains('=')) {
        return Err(Error::invalid("environment", format!("{bad:?} is no name of a variable")));
    }
    let parts = request.command.iter().chain(request.environment.values()).chain(request.environment.keys());
    if parts.chain(&request.cwd).any(|s| s.contains('\0')) {
        return Err(Error::invalid("command", "must not contain NUL"));
    }
    let mut env = vec![("PATH".to_owned(), PATH.to_owned()), ("container".to_owned(), "lxc".to_owned())];
    if request.uid == 0 {
        env.push(("HOME".to_owned(), "/root".to_owned()));
        env.push(("USER".to_owned(), "root".to_owned()));
    }
    if let (Some(_), term) = (request.terminal, &request.term) {
        env.push(("TERM".to_owned(), term.clone().unwrap_or_else(|| "linux".to_owned())));
    }
    let record = &running.record;
    for (k, v) in record.environment.iter().chain(&request.environment) {
        env.retain(|(name, _)| name != k);
        env.push((k.clone(), v.clone()));
    }
    // Beyond its own lie the ids of other guests.
    for (field, id) in [("uid", request.uid), ("gid", request.gid)] {
        if id >= record.inside().count {
            let text = format!("the container has the ids 0 to {}, not {id}", record.inside().count - 1);
            return Err(Error::invalid(field, text));
        }
    }
    let wire = Request {
        operation: Operation::Exec,
        pid: init.pid,
        cgroups: running.entry()?,
        argv: request.command.iter().map(OsString::from).collect(),
        env: env.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
        uid: Some(request.uid),
        gid: Some(request.gid),
        cwd: request.cwd.as_ref().map(OsString::from),
        terminal: request.terminal,
        denied: record
            .fixed
            .denied
            .iter()
            .filter_map(|call| Some((call.number()?, call.errno.unwrap_or(0).into())))
            .collect(),
        ..Request::default()
    };
    let (mut theirs, mut ours) = (vec![], vec![]);
    if request.terminal.is_none() {
        // Owned by the user inside, who may open `/dev/stdout` again.
        let owner = Some(Uid::from_raw(record.inside().base.saturating_add(request.uid)));
        let group = Some(Gid::from_raw(record.inside().base.saturating_add(request.gid)));
        for stdin in [true, false, false] {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
            fchown(&read, owner, group).map_err(std::io::Error::from)?;
            let (a, b) = if stdin { (read, write) } else { (write, read) };
            theirs.push(a);
            ours.push(b);
        }
    }
    let mut helper =
        Helper::start(&record.daemon_id, &record.instance.to_string(), &wire, init.pidfd, theirs).await?;
    let (_, terminal) = helper.reply().await?;
    helper.release();
    let mut ours = ours.into_iter();
    let (streams, size) = match (terminal, ours.next(), ours.next(), ours.next()) {
        (Some(master), ..) => {
            let copy = master.try_clone()?;
            (ExecStreams::Terminal(master), Some(copy))
        }
        (None, Some(stdin), Some(stdout), Some(stderr)) => {
            (ExecStreams::Pipes { stdin, stdout, stderr }, None)
        }
        _ => return Err(Error::internal("the program could not be started", "no streams")),
    };
    Ok(Exec {
        streams,
        control: Box::new(Control { helper, terminal: size.into(), ended: Mutex::new(None) }),
    })
}

struct Control {
    helper: Helper,
    /// Another descriptor of the terminal's master; dropped at the end, so that readers see it.
    terminal: std::sync::Mutex<Option<OwnedFd>>,
    ended: Mutex<Option<i32>>,
}

#[async_trait]
impl ExecControl for Control {
    async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let terminal = self.terminal.lock().unwrap_or_else(|e| e.into_inner());
        let Some(terminal) = terminal.as_ref() else {
            return Err(Error::unsupported("the program has no terminal, or has ended"));
        };
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal, size).map_err(std::io::Error::from)?;
        Ok(())
    }

    async fn signal(&self, signal: i32) -> Result<()> {
        let number = u8::try_from(signal)
            .ok()
            .filter(|n| (1..=64).contains(n))
            .ok_or_else(|| Error::invalid("signal", format!("{signal} is no signal")))?;
        self.helper
            .socket
            .send(&[SIGNAL, number], &[])
            .await
            .map_err(|_| Error::not_found("the program has ended"))
    }

    async fn wait(&self) -> Result<i32> {
        let mut ended = self.ended.lock().await;
        if let Some(code) = *ended {
            return Ok(code);
        }
        let packet = self.helper.socket.receive(p::MAX).await?;
        let code = match packet.as_ref().map(|(b, _)| b.as_slice()) {
            Some([_, p::code::EVENT, a, b, c, d]) => i32::from_le_bytes([*a, *b, *c, *d]),
            _ => {
                return Err(Error::internal("the program's end could not be learned", "its helper died"));
            }
        };
        *ended = Some(code);
        self.terminal.lock().unwrap_or_else(|e| e.into_inner()).take();
        Ok(code)
    }
}
