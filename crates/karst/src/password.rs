//! Passwords that a command needs: out of a file or of stdin, never of the command line, which everybody on the machine can read.

use std::{
    io::{BufRead as _, Read as _, Write as _},
    path::Path,
};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{
    context::at,
    error::{Error, Result},
    terminal,
};

/// Most bytes of a password; what is longer is another file.
const MOST: u64 = 4096;

/// A terminal that shows nothing of what is typed, until dropped.
struct Hidden(Termios);

impl Hidden {
    fn enter() -> Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin)?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(stdin, OptionalActions::Now, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The first line of `file`, or of stdin when none is named or it is `-`. At a terminal it is asked for, as `what`, and not shown.
pub fn read(file: Option<&Path>, what: &str) -> Result<String> {
    let file = file.filter(|path| *path != Path::new("-"));
    let text = match file {
        Some(path) => {
            let mut text = String::new();
            let open = std::fs::File::open(path).and_then(|f| f.take(MOST + 1).read_to_string(&mut text));
            open.map_err(|error| at(path, &error))?;
            text
        }
        None if terminal::is_terminal(rustix::stdio::stdin()) => {
            let mut prompt = std::io::stderr();
            write!(prompt, "{what}: ")?;
            prompt.flush()?;
            let hidden = Hidden::enter()?;
            let mut text = String::new();
            std::io::stdin().lock().read_line(&mut text)?;
            drop(hidden);
            writeln!(prompt)?;
            text
        }
        None => {
            let mut text = String::new();
            std::io::stdin().lock().take(MOST + 1).read_to_string(&mut text)?;
            text
        }
    };
    first_line(&text)
}

fn first_line(text: &str) -> Result<String> {
    if text.len() as u64 > MOST {
        return Err(Error::local(format!("that is no password: it has more than {MOST} bytes")));
    }
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(Error::local(
            "there is no password: write one line to stdin, or name a file with --file",
        ));
    }
    if text.contains('\n') {
        return Err(Error::local("that is no password: it has several lines"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_a_password() {
        for text in ["open sesame", "open sesame\n", "open sesame\r\n"] {
            assert_eq!(first_line(text).unwrap(), "open sesame");
        }
        for bad in ["", "\n", "a\nb\n"] {
            let error = first_line(bad).unwrap_err();
            assert_eq!(error.exit_code(), 1);
        }
        assert!(first_line(&"x".repeat(5000)).is_err());
    }
}
