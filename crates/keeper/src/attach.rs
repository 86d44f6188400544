//! The request that `karst-keeper --attach` takes: a program to run, or a file to read, write or delete, inside a
//! container. Shared with the container driver. Helper and driver are of one version (the helper lives for one request),
//! but the header is checked all the same.
//!
//! On the launch socket the driver sends one packet `F` with descriptors: the request itself (a memory file), the pidfd of
//! the container's init (or the root directory of a stopped container), then standard input, output and error of a program
//! without a terminal, or the content of a file to write,
//! or the mount namespace to mount from. Replies have the form of [`crate::protocol`]; a failure's body is
//! the error number (`i32`) and a text. After a program was started the driver may send `S signal: u8`; the helper sends
//! one `EVENT` with the exit code (`i32`) at the end. If the driver's end closes, the program is killed.

use crate::text;
use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// First line.
pub const HEADER: &[u8] = b"karst-attach 1\n";
/// First byte of the packet that asks for a signal.
pub const SIGNAL: u8 = b'S';

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Operation {
    /// Run a program.
    #[default]
    Exec,
    /// Open a file, directory or link for reading.
    Open,
    /// Write a regular file.
    WriteFile,
    /// Make a directory.
    WriteDirectory,
    /// Make a symbolic link.
    WriteSymlink,
    /// Delete a file or an empty directory.
    Delete,
    /// Mount what lies at `target` in the mount namespace whose descriptor follows.
    Mount,
    /// Take away what is mounted at the path.
    Unmount,
}

const OPERATIONS: &[(Operation, &str)] = &[
    (Operation::Exec, "exec"),
    (Operation::Open, "open"),
    (Operation::WriteFile, "file"),
    (Operation::WriteDirectory, "directory"),
    (Operation::WriteSymlink, "symlink"),
    (Operation::Delete, "delete"),
    (Operation::Mount, "mount"),
    (Operation::Unmount, "unmount"),
];

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// What.
    pub operation: Operation,
    /// Host pid of the container's init; 0: the container does not run and its root directory is given instead.
    pub pid: u32,
    /// Cgroup directories for the program.
    pub cgroups: Vec<PathBuf>,
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// User inside; for a file its owner, unchanged when absent.
    pub uid: Option<u32>,
    /// Group inside.
    pub gid: Option<u32>,
    /// Working directory; without one `/root` where it can be entered, else `/`.
    pub cwd: Option<OsString>,
    /// Columns and rows of a terminal.
    pub terminal: Option<(u16, u16)>,
    /// System calls that the program may not make, by number, and the error that they answer; 0 kills who calls.
    pub denied: Vec<(u32, u32)>,
    /// Path of a file.
    pub path: OsString,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Append; of an unmount: remove the empty file below.
    pub append: bool,
    /// Target of a symbolic link; what is mounted.
    pub target: OsString,
}

impl Request {
    /// The text.
    pub fn render(&self) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt;
        let mut out = HEADER.to_vec();
        let mut put = |k: &str, v: &[u8]| text::put(&mut out, k, v);
        let operation = OPERATIONS.iter().find(|(o, _)| *o == self.operation);
        put("operation", operation.map_or("", |(_, s)| s).as_bytes());
        put("pid", self.pid.to_string().as_bytes());
        for c in &self.cgroups {
            put("cgroup", c.as_os_str().as_bytes());
        }
        for a in &self.argv {
            put("arg", a.as_bytes());
        }
        for (k, v) in &self.env {
            put("env", &[k.as_bytes(), b"=", v.as_bytes()].concat());
        }
        let numbers = [("uid", self.uid), ("gid", self.gid), ("mode", self.mode)];
        for (k, v) in numbers.into_iter().filter_map(|(k, v)| Some((k, v?))) {
            put(k, v.to_string().as_bytes());
        }
        if let Some(cwd) = &self.cwd {
            put("cwd", cwd.as_bytes());
        }
        if let Some((columns, rows)) = self.terminal {
            put("terminal", format!("{columns}.{rows}").as_bytes());
        }
        for (number, errno) in &self.denied {
            put("deny", format!("{number}.{errno}").as_bytes());
        }
        put("path", self.path.as_bytes());
        put("append", if self.append { b"1" } else { b"0" });
        put("target", self.target.as_bytes());
        out
    }

    /// Reads the text.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let body = content.strip_prefix(HEADER).ok_or("the request is of another version")?;
        let mut r = Request::default();
        let os = OsString::from_vec;
        for line in text::lines(body) {
            let (key, value) = line?;
            match key {
                "operation" => {
                    r.operation = OPERATIONS
                        .iter()
                        .find(|(_, s)| s.as_bytes() == value)
                        .map(|(o, _)| *o)
                        .ok_or("unknown operation")?;
                }
                "pid" => r.pid = text::number(key, &value)?,
                "cgroup" => r.cgroups.push(os(value).into()),
                "arg" => r.argv.push(os(value)),
                "env" => {
                    let at = value.iter().position(|b| *b == b'=').ok_or("env without =")?;
                    let (k, v) = value.split_at(at);
                    r.env.push((os(k.to_vec()), os(v[1..].to_vec())));
                }
                "uid" => r.uid = Some(text::number(key, &value)?),
                "gid" => r.gid = Some(text::number(key, &value)?),
                "mode" => r.mode = Some(text::number(key, &value)?),
                "cwd" => r.cwd = Some(os(value)),
                "terminal" => {
                    let (c, l) = text::pair(key, &value)?;
                    r.terminal =
                        Some((u16::try_from(c).unwrap_or(u16::MAX), u16::try_from(l).unwrap_or(u16::MAX)));
                }
                "deny" => {
                    let (number, errno) = text::pair(key, &value)?;
                    let small = |n: u64| u32::try_from(n).map_err(|_| "deny: too large".to_owned());
                    r.denied.push((small(number)?, small(errno)?));
                }
                "path" => r.path = os(value),
                "append" => r.append = value == b"1",
                "target" => r.target = os(value),
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        if r.operation == Operation::Exec && (r.argv.is_empty() || r.pid == 0) {
            return Err("nothing to run, or nowhere".into());
        }
        Ok(r)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_and_parses_back() {
        let r = Request {
            operation: Operation::WriteSymlink,
            pid: 5,
            cgroups: vec!["/c".into()],
            argv: vec!["a".into(), "\n\\".into()],
            env: vec![("K".into(), "v=w".into())],
            uid: Some(1),
            gid: Some(2),
            cwd: Some("/x".into()),
            terminal: Some((80, 24)),
            denied: vec![(250, 38), (101, 0)],
            path: "/p".into(),
            mode: Some(0o640),
            append: true,
            target: "t".into(),
        };
        assert_eq!(Request::parse(&r.render()).unwrap(), r);
        assert!(Request::parse(b"karst-attach 1\noperation=exec\n").is_err());
    }
}
