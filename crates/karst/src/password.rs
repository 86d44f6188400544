//! Passwords that a command needs: out of a file or of stdin, never of the command line, which everybody on the machine can read.

use std::{
    io::{BufRead, ErrorKind, Read as _, Write as _},
    path::Path,
};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use crate::{
    context::at,
    error::{Error, Result},
    terminal,
};

/// Most bytes of a password; what is longer is another file.
const MOST: u64 = 4096;

/// A terminal that shows nothing of what is typed, until dropped. What would end or stop the process is read like any other key,
/// or the terminal would stay so.
struct Hidden {
    before: Termios,
    /// Keys by which the user gives up.
    given_up: Vec<u8>,
}

/// A terminal's settings while a password is typed, and the keys by which the user gives up.
fn hidden(before: &Termios) -> (Termios, Vec<u8>) {
    let mut hidden = before.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    if !before.local_modes.contains(LocalModes::ISIG) {
        return (hidden, vec![]);
    }
    hidden.local_modes.remove(LocalModes::ISIG);
    let [interrupt, quit, suspend] =
        [SpecialCodeIndex::VINTR, SpecialCodeIndex::VQUIT, SpecialCodeIndex::VSUSP]
            .map(|key| before.special_codes[key]);
    // They end the line: what is typed is read when a line is.
    hidden.special_codes[SpecialCodeIndex::VEOL] = interrupt;
    hidden.special_codes[SpecialCodeIndex::VEOL2] = quit;
    // 0: there is no such key.
    (hidden, [interrupt, quit, suspend].into_iter().filter(|key| *key != 0).collect())
}

impl Hidden {
    fn enter() -> Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin)?;
        let (hidden, given_up) = hidden(&before);
        tcsetattr(stdin, OptionalActions::Now, &hidden)?;
        Ok(Self { before, given_up })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

/// A line as it is typed, its end included; interrupted by one of the keys `given_up`.
fn typed(input: &mut impl BufRead, given_up: &[u8]) -> Result<String> {
    let mut line = vec![];
    while line.len() as u64 <= MOST {
        let chunk = match input.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            chunk => chunk?,
        };
        let end = chunk.iter().position(|byte| *byte == b'\n' || given_up.contains(byte));
        let last = end.map(|at| chunk[at]);
        let taken = end.map_or(chunk.len(), |at| at + 1);
        line.extend_from_slice(&chunk[..taken]);
        input.consume(taken);
        match last {
            Some(key) if given_up.contains(&key) => {
                return Err(Error::Interrupted("interrupted".to_owned()));
            }
            None if taken > 0 => {}
            _ => break,
        }
    }
    String::from_utf8(line).map_err(|_| Error::local("that is no password: it is not UTF-8"))
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
            let text = typed(&mut std::io::stdin().lock(), &hidden.given_up);
            drop(hidden);
            writeln!(prompt)?;
            text?
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
    fn who_gives_up_at_the_prompt_is_heard_and_leaves_the_terminal_as_it_was() {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = std::fs::File::from(ioctl_tiocgptpeer(&master, flags).unwrap());
        let before = tcgetattr(&terminal).unwrap();
        let (hidden, given_up) = hidden(&before);
        assert!(!hidden.local_modes.intersects(LocalModes::ECHO | LocalModes::ISIG));
        assert_eq!(given_up, [0x03, 0x1c, 0x1a]);
        tcsetattr(&terminal, OptionalActions::Now, &hidden).unwrap();
        let mut input = std::io::BufReader::new(&terminal);
        let mut types = |keys: &[u8]| {
            rustix::io::write(&master, keys).unwrap();
            typed(&mut input, &given_up)
        };
        // A key of the line still is one.
        assert_eq!(types(b"openn\x7f sesame\n").unwrap(), "open sesame\n");
        for keys in [&b"op\x03\n"[..], b"op\x1c\n"] {
            let error = types(keys).unwrap_err();
            assert_eq!(error.exit_code(), 130);
            assert_eq!(types(b"").unwrap(), "\n", "what was typed after it is not lost");
        }
        assert_eq!(types(b"op\x1aen\n").unwrap_err().exit_code(), 130);
        let mut ended = &b"no end"[..];
        assert_eq!(typed(&mut ended, &given_up).unwrap(), "no end");
        assert!(typed(&mut &b"\xff\n"[..], &given_up).is_err());
    }

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
