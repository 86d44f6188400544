//! The poll loop: the main process, the console, the deadline and the clients.

use crate::{Dir, child::Main, console::Console, sys};
use karst_keeper::{Exit, Requested, Spec, State, Status, files, protocol as p};
use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// Most connections at a time; the next ones are closed at once.
const MAX_CONNECTIONS: usize = 32;
/// How much of the main process' output the status keeps.
const OUTPUT_TAIL: usize = 4096;
/// How long remaining descendants may take to die.
const SWEEP: Duration = Duration::from_secs(5);

struct Connection {
    fd: OwnedFd,
    watches: bool,
}

/// Everything the loop works on.
pub(crate) struct Server {
    dir: Dir,
    spec: Spec,
    status: Status,
    signals: OwnedFd,
    listener: OwnedFd,
    console: Console,
    main: Main,
    output_open: bool,
    output: Vec<u8>,
    deadline: Option<sys::Deadline>,
    connections: Vec<Connection>,
}

impl Server {
    #[allow(clippy::too_many_arguments)] // called once, by main
    pub(crate) fn new(
        dir: Dir,
        spec: Spec,
        status: Status,
        signals: OwnedFd,
        listener: OwnedFd,
        console: Console,
        main: Main,
    ) -> Self {
        Self {
            dir,
            spec,
            status,
            signals,
            listener,
            console,
            main,
            output_open: true,
            output: vec![],
            deadline: None,
            connections: vec![],
        }
    }

    /// Runs until the guest has ended and its end is written down.
    pub(crate) fn run(mut self) {
        while self.turn() {}
        self.finish();
    }

    /// Waits for one round of events; `false` when the main process has ended.
    fn turn(&mut self) -> bool {
        let mut fds: Vec<libc::pollfd> = Vec::with_capacity(8 + self.connections.len());
        let mut add = |fd: Option<(i32, i16)>| {
            let (fd, events) = fd.unwrap_or((-1, 0)); // poll skips negative numbers
            fds.push(libc::pollfd { fd, events, revents: 0 });
        };
        add(Some((self.main.pidfd.as_raw_fd(), libc::POLLIN)));
        add(Some((self.signals.as_raw_fd(), libc::POLLIN)));
        add(Some((self.listener.as_raw_fd(), libc::POLLIN)));
        add(self.deadline.as_ref().map(|d| (d.as_fd().as_raw_fd(), libc::POLLIN)));
        add(self.output_open.then_some((self.main.output.as_raw_fd(), libc::POLLIN)));
        add(self.console.guest_poll().map(|(f, e)| (f.as_raw_fd(), e)));
        add(self.console.client_poll().map(|(f, e)| (f.as_raw_fd(), e)));
        for c in &self.connections {
            add(Some((c.fd.as_raw_fd(), libc::POLLIN)));
        }
        // SAFETY: the array lives through the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } < 0 {
            return true; // interrupted
        }
        let ready: Vec<i16> = fds.iter().map(|f| f.revents).collect();
        if ready[4] != 0 {
            self.read_output();
        }
        if ready[5] != 0 {
            self.console.guest_ready(ready[5]);
        }
        if ready[6] != 0 {
            self.console.client_ready(ready[6]);
        }
        if ready[3] != 0
            && let Some(d) = &self.deadline
        {
            sys::drain(d.as_fd());
            self.status.requested = Requested::Deadline;
            self.signal(libc::SIGKILL);
        }
        if ready[1] != 0 {
            sys::drain(self.signals.as_fd());
            self.reap_orphans();
        }
        // From the end, so that removing one leaves the places of those not yet looked at.
        for i in (0..self.connections.len()).rev() {
            if ready[7 + i] != 0 && !self.serve(i) {
                self.connections.swap_remove(i);
            }
        }
        if ready[2] != 0 {
            self.accept();
        }
        ready[0] == 0
    }

    fn accept(&mut self) {
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        while let Ok(fd) = rustix::net::accept_with(&self.listener, flags) {
            if self.connections.len() < MAX_CONNECTIONS && sys::peer_allowed(fd.as_fd()) {
                self.connections.push(Connection { fd, watches: false });
            }
        }
    }

    fn read_output(&mut self) {
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::io::read(&self.main.output, &mut buffer) {
                Ok(0) => self.output_open = false,
                Ok(n) => {
                    self.output.extend_from_slice(&buffer[..n]);
                    let surplus = self.output.len().saturating_sub(OUTPUT_TAIL);
                    self.output.drain(..surplus);
                    continue;
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => self.output_open = false,
            }
            return;
        }
    }

    /// Reaps every ended descendant but the main process, which stays a zombie until its end is read.
    fn reap_orphans(&mut self) {
        loop {
            // SAFETY: the structure is filled by the call.
            let pid = unsafe {
                let mut info = std::mem::zeroed::<libc::siginfo_t>();
                let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                if libc::waitid(libc::P_ALL, 0, &mut info, flags) < 0 {
                    return;
                }
                info.si_pid()
            };
            if pid <= 0 || pid as u32 == self.main.pid {
                return;
            }
            // SAFETY: reaps the process that was just seen.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        }
    }

    /// Sends a signal to the main process.
    fn signal(&self, signal: i32) -> bool {
        if signal == libc::SIGKILL {
            for (path, value) in &self.spec.kill_writes {
                let _ = sys::write_file(path, value.as_bytes());
            }
        }
        // SAFETY: the descriptor is a pidfd, no siginfo is given.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.main.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            ) == 0
        }
    }

    /// Serves one packet of a connection; `false` closes it.
    fn serve(&mut self, i: usize) -> bool {
        let mut packet = [0u8; 64];
        let n = match rustix::io::read(&self.connections[i].fd, &mut packet) {
            Ok(0) => return false,
            Ok(n) => n,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
            Err(_) => return false,
        };
        let mut attachment = None;
        let (code, body) = self.answer(i, &packet[..n], &mut attachment);
        sys::send(
            self.connections[i].fd.as_fd(),
            &[p::VERSION, code],
            &body,
            attachment.as_ref().map(|f| f.as_fd()),
        )
    }

    fn answer(&mut self, i: usize, packet: &[u8], attachment: &mut Option<OwnedFd>) -> (u8, Vec<u8>) {
        use p::code::*;
        let [version, operation, body @ ..] = packet else {
            return (BAD, b"packet too short".to_vec());
        };
        if *operation == p::op::HELLO {
            let mut answer = vec![p::OLDEST, p::VERSION];
            answer.extend(self.status.render());
            return (OK, answer);
        }
        if !(p::OLDEST..=p::VERSION).contains(version) {
            return (BAD, b"version not spoken".to_vec());
        }
        match (*operation, body) {
            (p::op::STATUS, []) => (OK, self.status.render()),
            (p::op::WATCH, []) => {
                self.connections[i].watches = true;
                (OK, self.status.render())
            }
            (p::op::ATTACH, _) if !self.console.exists() => (UNSUPPORTED, b"no console".to_vec()),
            (p::op::ATTACH, [flags]) => match self.console.attach(flags & p::ATTACH_FORCE != 0) {
                Ok(Some(fd)) => {
                    *attachment = Some(fd);
                    (OK, vec![])
                }
                Ok(None) => (BUSY, b"the console is in use".to_vec()),
                Err(e) => (FAILED, e.to_string().into_bytes()),
            },
            (p::op::RESIZE, [a, b, c, d]) => {
                if self.console.resize(u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])) {
                    (OK, vec![])
                } else {
                    (UNSUPPORTED, b"no terminal".to_vec())
                }
            }
            (p::op::SIGNAL, [signal @ 1..=64]) => {
                if *signal as i32 == libc::SIGKILL && self.status.requested == Requested::Nobody {
                    self.status.requested = Requested::Force;
                }
                if self.signal(*signal as i32) {
                    (OK, vec![])
                } else {
                    (GONE, b"the guest has ended".to_vec())
                }
            }
            (p::op::DEADLINE, body) if body.len() == 8 => {
                let at = u64::from_le_bytes(body.try_into().unwrap_or_default());
                match self.set_deadline(at) {
                    Ok(()) => (OK, vec![]),
                    Err(e) => (FAILED, e.to_string().into_bytes()),
                }
            }
            (p::op::CLEAR_LOG, []) => {
                self.console.clear();
                (OK, vec![])
            }
            (p::op::MARK, [requested]) => match Requested::from_byte(*requested) {
                Some(r) => {
                    // With the keeper it would be lost, and with it the guest: then that is how it ended.
                    self.status.requested = r;
                    (OK, vec![])
                }
                None => (BAD, b"unknown mark".to_vec()),
            },
            _ => (BAD, b"unknown operation or body".to_vec()),
        }
    }

    fn set_deadline(&mut self, at: u64) -> std::io::Result<()> {
        if self.deadline.is_none() {
            if at == 0 {
                return Ok(());
            }
            self.deadline = Some(sys::Deadline::new()?);
        }
        match &self.deadline {
            Some(d) => d.set(at),
            None => Ok(()),
        }
    }

    /// The main process has ended: ends what is left below, keeps the last words, tells everybody, and goes.
    fn finish(mut self) {
        self.status.exit = self.reap_main();
        self.sweep();
        self.read_output();
        self.console.drain_to_end();
        self.status.state = State::Exited;
        self.status.ended_at = sys::now();
        self.status.output = String::from_utf8_lossy(&self.output).into_owned();
        let _ = self.dir.write_status(&self.status, false);
        // No new connection from here on: whoever finds no socket reads the file, which is complete.
        let _ = std::fs::remove_file(self.dir.path(files::SOCKET));
        self.accept();
        let text = self.status.render();
        for c in &self.connections {
            if c.watches {
                sys::send(c.fd.as_fd(), &[p::VERSION, p::code::EVENT], &text, None);
            }
        }
        // After the news: only a power cut could lose it now.
        self.dir.let_go();
        let _ = self.dir.write_status(&self.status, true);
    }

    fn reap_main(&self) -> Option<Exit> {
        let mut raw = 0;
        loop {
            // SAFETY: waits for our own child, which has ended.
            let got = unsafe { libc::waitpid(self.main.pid as i32, &mut raw, 0) };
            if got < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            break;
        }
        if libc::WIFSIGNALED(raw) {
            Some(Exit::Signal(libc::WTERMSIG(raw)))
        } else {
            Some(Exit::Code(libc::WEXITSTATUS(raw)))
        }
    }

    /// Kills and reaps every remaining descendant; as the subreaper, all of them are our children by and by.
    fn sweep(&mut self) {
        let until = Instant::now() + SWEEP;
        loop {
            loop {
                // SAFETY: reaps any ended child.
                match unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } {
                    0 => break,
                    n if n < 0 => return, // none left
                    _ => {}
                }
            }
            let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
            for pid in children.split_ascii_whitespace().filter_map(|p| p.parse().ok()) {
                // SAFETY: a child that was not reaped keeps its number.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let mut fd = libc::pollfd { fd: self.signals.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one initialised entry. The cap makes an orphan that arrives without a signal noticed.
            unsafe { libc::poll(&mut fd, 1, left.as_millis().min(20) as i32) };
            sys::drain(self.signals.as_fd());
        }
    }
}
