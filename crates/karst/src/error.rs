//! What can go wrong, in the one line that the user reads, and the exit code that scripts read.

use std::io;

/// Result of everything in this program.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, or an end that is none ([`Error::Exit`], [`Error::ClosedPipe`]).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused the request; `status` is its HTTP status.
    #[error("{message}")]
    Api {
        /// HTTP status of the answer.
        status: u16,
        /// The server's text.
        message: String,
    },
    /// The server accepted the work and it failed later.
    #[error("{0}")]
    Operation(String),
    /// No server answers at the socket, or it went away in the middle.
    #[error("{0}")]
    Unreachable(String),
    /// The command line cannot be meant like this (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// Something on this side failed.
    #[error("{0}")]
    Local(String),
    /// The user pressed ctrl-C (exit code 130).
    #[error("{0}")]
    Interrupted(String),
    /// The command in the guest ended with this code; nothing to print.
    #[error("exit code {0}")]
    Exit(i32),
    /// Several things failed and were already reported one by one.
    #[error("{0} failed")]
    Reported(usize),
    /// Whoever read our output has closed it: not an error.
    #[error("closed pipe")]
    ClosedPipe,
}

impl Error {
    /// A failure on this side.
    pub fn local(text: impl std::fmt::Display) -> Self {
        Self::Local(text.to_string())
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted(_) => 130,
            Self::Exit(code) => *code,
            Self::ClosedPipe => 0,
            _ => 1,
        }
    }

    /// The line for stderr without the `karst: ` before it; `None` where nothing is to be said.
    pub fn line(&self) -> Option<String> {
        match self {
            Self::Exit(_) | Self::ClosedPipe | Self::Reported(_) => None,
            other => Some(one_line(&other.to_string())),
        }
    }

    /// Whether the server said that the thing does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { status: 404, .. })
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Local(io_text(&error))
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(error: rustix::io::Errno) -> Self {
        Self::from(io::Error::from(error))
    }
}

/// The text of an IO error without Rust's `(os error N)`.
pub fn io_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((head, _)) => head.to_lowercase(),
        None => text,
    }
}

/// Folds a text of several lines into one: errors are one line, whatever the server sent.
pub fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Prints the error as `karst: ...` on stderr.
pub fn report(error: &Error) {
    if let Some(line) = error.line() {
        report_line(&line);
    }
}

/// Prints one line of error; a closed stderr is ignored.
pub fn report_line(line: &str) {
    use std::io::Write as _;
    crate::output::progress::suspend(|| {
        let _ = writeln!(io::stderr(), "karst: {line}");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_lines_become_one() {
        assert_eq!(one_line("first\n  second\n\nthird\n"), "first; second; third");
    }

    #[test]
    fn exit_codes() {
        assert_eq!(Error::Usage(String::new()).exit_code(), 2);
        assert_eq!(Error::Interrupted(String::new()).exit_code(), 130);
        assert_eq!(Error::Exit(7).exit_code(), 7);
        assert_eq!(Error::ClosedPipe.exit_code(), 0);
        assert_eq!(Error::local("x").exit_code(), 1);
    }

    #[test]
    fn io_errors_lose_their_number() {
        assert_eq!(io_text(&io::Error::from_raw_os_error(2)), "no such file or directory");
    }
}
