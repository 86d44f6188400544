//! Changing a text in the user's editor.

use std::io::{IsTerminal, Read};

use crate::error::{Error, Result};

/// Editors that are tried when neither VISUAL nor EDITOR is set.
const FALLBACKS: [&str; 3] = ["editor", "vi", "nano"];

/// Whether an edit is done in an editor; otherwise the new text comes from stdin.
pub fn is_interactive() -> bool {
    std::io::stdin().is_terminal()
}

/// The text on stdin.
pub fn from_stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().lock().read_to_string(&mut text)?;
    Ok(text)
}

/// Lets the user change a text; `suffix` tells the editor its format.
pub fn edit(text: &str, suffix: &str) -> Result<String> {
    let file = tempfile::Builder::new().prefix("karst-").suffix(suffix).tempfile()?;
    std::fs::write(file.path(), text)?;
    run(file.path())?;
    Ok(std::fs::read_to_string(file.path())?)
}

/// Runs the editor on a file. This is the one program that the command line starts: the user's own, as the user.
#[allow(clippy::disallowed_methods, reason = "the user's editor, run as the user; argv only, no shell")]
pub fn run(path: &std::path::Path) -> Result<()> {
    let chosen = ["VISUAL", "EDITOR"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|v| !v.trim().is_empty()));
    let candidates: Vec<&str> = match &chosen {
        Some(command) => vec![command],
        None => FALLBACKS.to_vec(),
    };
    for candidate in candidates {
        let mut words = candidate.split_whitespace();
        let Some(program) = words.next() else { continue };
        match std::process::Command::new(program).args(words).arg(path).status() {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => {
                return Err(Error::Local(format!(
                    "the editor \"{candidate}\" failed: {status}; nothing was changed"
                )));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Error::Local(format!("{candidate}: {}", crate::error::io_text(&error))));
            }
        }
    }
    Err(Error::local("no editor found: set EDITOR, or give the new text on stdin"))
}

/// Asks whether to edit again after a mistake; `false` when stdin ended.
pub fn again(error: &Error) -> Result<bool> {
    crate::error::report(error);
    crate::error::report_line("press enter to open the editor again, ctrl-C to give up");
    let mut line = String::new();
    Ok(std::io::stdin().read_line(&mut line)? > 0)
}
