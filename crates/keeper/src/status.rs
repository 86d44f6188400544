//! The status file and the status text of the protocol: first line [`HEADER`], then `key=value` lines. Unknown keys are
//! skipped, so that an older client reads a newer keeper.

use crate::text;

/// First line.
pub const HEADER: &[u8] = b"karst-keeper-status 1\n";

/// What the guest's main process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// Being made.
    #[default]
    Starting,
    /// Its program was executed.
    Running,
    /// It ended; `exit` says how.
    Exited,
    /// It could not be executed; `reason` says why.
    Failed,
}

/// How the main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Who asked for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Requested {
    /// Nobody.
    #[default]
    Nobody = 0,
    /// A graceful stop was asked for.
    Shutdown = 1,
    /// It was ended by force.
    Force = 2,
    /// Its deadline passed.
    Deadline = 3,
}

impl Requested {
    /// Out of the protocol's byte.
    pub fn from_byte(b: u8) -> Option<Self> {
        [Self::Nobody, Self::Shutdown, Self::Force, Self::Deadline].into_iter().find(|r| *r as u8 == b)
    }
}

/// A status.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Process id of the keeper.
    pub keeper_pid: u32,
    /// Its start time (field 22 of `/proc/PID/stat`, clock ticks since boot): tells a reused pid.
    pub keeper_start: u64,
    /// Short id of the daemon's instance.
    pub daemon: String,
    /// Instance.
    pub instance: String,
    /// Generation.
    pub generation: (u64, u64),
    /// State.
    pub state: State,
    /// Main process.
    pub pid: Option<u32>,
    /// Its start time, as `keeper_start`.
    pub pid_start: u64,
    /// When it was started, seconds since the epoch.
    pub started_at: i64,
    /// When it ended, seconds since the epoch.
    pub ended_at: i64,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Who asked for the end.
    pub requested: Requested,
    /// Why it failed, in words.
    pub reason: String,
    /// The end of what it wrote to standard output and error, at most 4 KiB.
    pub output: String,
}

impl Status {
    /// The text.
    pub fn render(&self) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        let mut put = |k: &str, v: &str| text::put(&mut out, k, v.as_bytes());
        put("keeper-pid", &self.keeper_pid.to_string());
        put("keeper-start", &self.keeper_start.to_string());
        put("daemon", &self.daemon);
        put("instance", &self.instance);
        put("generation", &format!("{}.{}", self.generation.0, self.generation.1));
        put(
            "state",
            match self.state {
                State::Starting => "starting",
                State::Running => "running",
                State::Exited => "exited",
                State::Failed => "failed",
            },
        );
        if let Some(pid) = self.pid {
            put("pid", &pid.to_string());
            put("pid-start", &self.pid_start.to_string());
        }
        put("started-at", &self.started_at.to_string());
        put("ended-at", &self.ended_at.to_string());
        match self.exit {
            Some(Exit::Code(n)) => put("exit-code", &n.to_string()),
            Some(Exit::Signal(n)) => put("exit-signal", &n.to_string()),
            None => {}
        }
        put("requested", &(self.requested as u8).to_string());
        put("reason", &self.reason);
        put("output", &self.output);
        out
    }

    /// Reads the text.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let body = content.strip_prefix(HEADER).ok_or("the status is of another version")?;
        let mut s = Status::default();
        for line in text::lines(body) {
            let (key, value) = line?;
            match key {
                "keeper-pid" => s.keeper_pid = text::number(key, &value)?,
                "keeper-start" => s.keeper_start = text::number(key, &value)?,
                "daemon" => s.daemon = text::string(value),
                "instance" => s.instance = text::string(value),
                "generation" => s.generation = text::pair(key, &value)?,
                "state" => {
                    s.state = match value.as_slice() {
                        b"starting" => State::Starting,
                        b"running" => State::Running,
                        b"exited" => State::Exited,
                        b"failed" => State::Failed,
                        _ => return Err("unknown state".into()),
                    }
                }
                "pid" => s.pid = Some(text::number(key, &value)?),
                "pid-start" => s.pid_start = text::number(key, &value)?,
                "started-at" => s.started_at = text::number(key, &value)?,
                "ended-at" => s.ended_at = text::number(key, &value)?,
                "exit-code" => s.exit = Some(Exit::Code(text::number(key, &value)?)),
                "exit-signal" => s.exit = Some(Exit::Signal(text::number(key, &value)?)),
                "requested" => {
                    s.requested = Requested::from_byte(text::number(key, &value)?).unwrap_or_default()
                }
                "reason" => s.reason = text::string(value),
                "output" => s.output = text::string(value),
                _ => {}
            }
        }
        Ok(s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_and_parses_back() {
        let s = Status {
            keeper_pid: 1,
            keeper_start: 2,
            daemon: "ab".into(),
            instance: "i".into(),
            generation: (1, 2),
            state: State::Exited,
            pid: Some(7),
            pid_start: 8,
            started_at: 9,
            ended_at: 10,
            exit: Some(Exit::Signal(9)),
            requested: Requested::Deadline,
            reason: "x\ny".into(),
            output: "a\\b\n".into(),
        };
        assert_eq!(Status::parse(&s.render()).unwrap(), s);
        let mut newer = s.render();
        newer.extend_from_slice(b"shiny=1\n");
        assert_eq!(Status::parse(&newer).unwrap(), s);
    }
}
