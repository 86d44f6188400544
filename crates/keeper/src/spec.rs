//! The specification file: what to run and how. Text, first line [`HEADER`], then `key=value` lines; an unknown key is
//! refused, because it could be a restriction that an older keeper would not apply.

use crate::text;
use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

/// First line.
pub const HEADER: &[u8] = b"karst-keeper-spec 1\n";

/// What the main process gets as its console. The keeper always drains it into the console log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Console {
    /// None.
    #[default]
    None,
    /// A new terminal: standard input and controlling terminal.
    Pty,
    /// One end of a stream socket pair as this descriptor.
    Socket(i32),
}

/// Everything the keeper needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Short id of the daemon's instance; equals argv's.
    pub daemon: String,
    /// Instance; equals argv's.
    pub instance: String,
    /// Generation of this start: incarnation and counter.
    pub generation: (u64, u64),
    /// The program, absolute.
    pub program: PathBuf,
    /// Its arguments, with the program's name first.
    pub argv: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// User, group and supplementary groups to become; as the keeper when absent.
    pub user: Option<(u32, u32, Vec<u32>)>,
    /// Set `no_new_privs`.
    pub no_new_privs: bool,
    /// Empty all capability sets, the bounding set too.
    pub clear_capabilities: bool,
    /// Cgroup directories that the keeper itself enters.
    pub keeper_cgroups: Vec<PathBuf>,
    /// Cgroup directories that the main process enters before its program is executed.
    pub cgroups: Vec<PathBuf>,
    /// Resource limits: kernel's number, soft, hard (`u64::MAX`: unlimited).
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Numbers that the handed-on descriptors get in the main process, in the order they are passed.
    pub fds: Vec<i32>,
    /// The first descriptor that is passed is a mount namespace, which the main process enters; it has no number.
    pub mount_namespace: bool,
    /// The next descriptor that is passed is a network namespace, which the main process enters; it has no number.
    pub network_namespace: bool,
    /// The next descriptor that is passed is a user namespace, which the main process enters last to become its user there; it
    /// has no number. What it may do then it may do to the ids of that namespace only.
    pub user_namespace: bool,
    /// Console.
    pub console: Console,
    /// Size of each of the two files of the console log, bytes.
    pub log_size: u64,
    /// The main process' `oom_score_adj`.
    pub oom_score_adj: i32,
    /// Files and values written before the main process is killed by request or deadline: thaws a frozen cgroup v1,
    /// whose processes do not even die otherwise. A missing file is fine.
    pub kill_writes: Vec<(PathBuf, String)>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            daemon: String::new(),
            instance: String::new(),
            generation: (0, 0),
            program: PathBuf::new(),
            argv: vec![],
            env: vec![],
            cwd: PathBuf::from("/"),
            user: None,
            no_new_privs: false,
            clear_capabilities: false,
            keeper_cgroups: vec![],
            cgroups: vec![],
            rlimits: vec![],
            fds: vec![],
            mount_namespace: false,
            network_namespace: false,
            user_namespace: false,
            console: Console::None,
            log_size: 128 * 1024,
            oom_score_adj: 0,
            kill_writes: vec![],
        }
    }
}

impl Spec {
    /// How many descriptors are passed.
    pub fn passed(&self) -> usize {
        let namespaces = [self.mount_namespace, self.network_namespace, self.user_namespace];
        self.fds.len() + namespaces.into_iter().filter(|entered| *entered).count()
    }

    /// The file's content.
    pub fn render(&self) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        let mut put = |k: &str, v: &[u8]| text::put(&mut out, k, v);
        put("daemon", self.daemon.as_bytes());
        put("instance", self.instance.as_bytes());
        put("generation", format!("{}.{}", self.generation.0, self.generation.1).as_bytes());
        put("program", self.program.as_os_str().as_bytes());
        for a in &self.argv {
            put("arg", a.as_bytes());
        }
        for (k, v) in &self.env {
            put("env", &[k.as_bytes(), b"=", v.as_bytes()].concat());
        }
        put("cwd", self.cwd.as_os_str().as_bytes());
        if let Some((uid, gid, groups)) = &self.user {
            put("uid", uid.to_string().as_bytes());
            put("gid", gid.to_string().as_bytes());
            for g in groups {
                put("group", g.to_string().as_bytes());
            }
        }
        put("no-new-privs", if self.no_new_privs { b"1" } else { b"0" });
        put("clear-capabilities", if self.clear_capabilities { b"1" } else { b"0" });
        for c in &self.keeper_cgroups {
            put("keeper-cgroup", c.as_os_str().as_bytes());
        }
        for c in &self.cgroups {
            put("cgroup", c.as_os_str().as_bytes());
        }
        for (r, soft, hard) in &self.rlimits {
            put("rlimit", format!("{r}:{soft}:{hard}").as_bytes());
        }
        for n in &self.fds {
            put("fd", n.to_string().as_bytes());
        }
        if self.mount_namespace {
            put("mount-namespace", b"1");
        }
        if self.network_namespace {
            put("network-namespace", b"1");
        }
        if self.user_namespace {
            put("user-namespace", b"1");
        }
        match self.console {
            Console::None => put("console", b"none"),
            Console::Pty => put("console", b"pty"),
            Console::Socket(n) => put("console", format!("socket:{n}").as_bytes()),
        }
        put("log-size", self.log_size.to_string().as_bytes());
        put("oom-score-adj", self.oom_score_adj.to_string().as_bytes());
        for (p, v) in &self.kill_writes {
            put("kill-write", &[v.as_bytes(), b"=", p.as_os_str().as_bytes()].concat());
        }
        out
    }

    /// Reads the file's content.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let body = content.strip_prefix(HEADER).ok_or("the specification is of another version")?;
        let mut spec = Spec::default();
        let (mut uid, mut gid, mut groups) = (None, None, vec![]);
        for line in text::lines(body) {
            let (key, value) = line?;
            match key {
                "daemon" => spec.daemon = text::string(value),
                "instance" => spec.instance = text::string(value),
                "generation" => spec.generation = text::pair(key, &value)?,
                "program" => spec.program = path(value),
                "arg" => spec.argv.push(OsString::from_vec(value)),
                "env" => {
                    let (k, v) = split(key, value, b'=')?;
                    spec.env.push((OsString::from_vec(k), OsString::from_vec(v)));
                }
                "cwd" => spec.cwd = path(value),
                "uid" => uid = Some(text::number(key, &value)?),
                "gid" => gid = Some(text::number(key, &value)?),
                "group" => groups.push(text::number(key, &value)?),
                "no-new-privs" => spec.no_new_privs = value == b"1",
                "clear-capabilities" => spec.clear_capabilities = value == b"1",
                "keeper-cgroup" => spec.keeper_cgroups.push(path(value)),
                "cgroup" => spec.cgroups.push(path(value)),
                "rlimit" => {
                    let (r, rest) = split(key, value, b':')?;
                    let (soft, hard) = split(key, rest, b':')?;
                    spec.rlimits.push((
                        text::number(key, &r)?,
                        text::number(key, &soft)?,
                        text::number(key, &hard)?,
                    ));
                }
                "fd" => spec.fds.push(text::number(key, &value)?),
                "mount-namespace" => spec.mount_namespace = value == b"1",
                "network-namespace" => spec.network_namespace = value == b"1",
                "user-namespace" => spec.user_namespace = value == b"1",
                "console" => {
                    spec.console = match value.as_slice() {
                        b"none" => Console::None,
                        b"pty" => Console::Pty,
                        v => Console::Socket(text::number(
                            key,
                            v.strip_prefix(b"socket:").ok_or("console: unknown mode")?,
                        )?),
                    }
                }
                "log-size" => spec.log_size = text::number(key, &value)?,
                "oom-score-adj" => spec.oom_score_adj = text::number(key, &value)?,
                "kill-write" => {
                    let (v, p) = split(key, value, b'=')?;
                    spec.kill_writes.push((path(p), text::string(v)));
                }
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        spec.user = match (uid, gid) {
            (Some(u), Some(g)) => Some((u, g, groups)),
            (None, None) if groups.is_empty() => None,
            _ => return Err("uid and gid belong together".into()),
        };
        // Whoever enters one has all capabilities there, whatever was taken away before.
        if spec.user_namespace && (spec.user.is_none() || spec.clear_capabilities) {
            return Err("a user namespace needs a user, and leaves its capabilities".into());
        }
        if !spec.program.is_absolute() || spec.argv.is_empty() {
            return Err("program must be absolute and have a name as its first argument".into());
        }
        let numbers = spec.fds.iter().copied().chain(match spec.console {
            Console::Socket(n) => Some(n),
            _ => None,
        });
        let mut seen: Vec<i32> = vec![];
        for n in numbers {
            // Small numbers only: they are moved out of the way by choosing numbers above the largest.
            if !(3..1000).contains(&n) || seen.contains(&n) {
                return Err(format!("fd {n} is out of 3..1000 or given twice"));
            }
            seen.push(n);
        }
        Ok(spec)
    }
}

fn path(v: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(v))
}

fn split(key: &str, mut v: Vec<u8>, at: u8) -> Result<(Vec<u8>, Vec<u8>), String> {
    let i = v.iter().position(|b| *b == at).ok_or_else(|| format!("{key}: {:?} is missing", at as char))?;
    let rest = v.split_off(i + 1);
    v.pop();
    Ok((v, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_and_parses_back() {
        let spec = Spec {
            daemon: "ab12cd".into(),
            instance: "x".into(),
            generation: (3, 9),
            program: "/bin/true".into(),
            argv: vec!["true".into(), "a\nb\\n=c".into(), "".into()],
            env: vec![("A".into(), "b=c\n".into())],
            user: Some((5, 6, vec![7, 8])),
            no_new_privs: true,
            clear_capabilities: true,
            keeper_cgroups: vec!["/k".into()],
            cgroups: vec!["/c".into(), "/d".into()],
            rlimits: vec![(7, 1024, u64::MAX)],
            fds: vec![10, 4],
            mount_namespace: true,
            network_namespace: true,
            console: Console::Socket(3),
            oom_score_adj: -100,
            kill_writes: vec![("/f=g".into(), "THAWED".into())],
            ..Spec::default()
        };
        assert_eq!(Spec::parse(&spec.render()).unwrap(), spec);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let with = |line: &str| {
            let mut s = HEADER.to_vec();
            s.extend_from_slice(b"program=/x\narg=x\n");
            s.extend_from_slice(line.as_bytes());
            Spec::parse(&s)
        };
        assert!(with("").is_ok());
        for bad in [
            "seccomp=1\n",
            "uid=5\n",
            "fd=2\n",
            "fd=4\nfd=4\n",
            "rlimit=1:2\n",
            "arg=\\x\n",
            "junk\n",
            "user-namespace=1\n",
            "user-namespace=1\nuid=0\ngid=0\nclear-capabilities=1\n",
        ] {
            assert!(with(bad).is_err(), "{bad}");
        }
        let entered = with("user-namespace=1\nuid=0\ngid=0\nfd=4\n").unwrap();
        assert_eq!((entered.passed(), Spec::parse(&entered.render())), (2, Ok(entered.clone())));
        assert!(Spec::parse(b"karst-keeper-spec 2\n").is_err());
    }
}
