//! What every command is given: the client and how to talk to the user.

use std::path::{Path, PathBuf};

use crate::{
    client::{Answer, Client, Operation, Transport},
    error::{Error, Result},
    output::progress::Progress,
};

/// Where a server is looked for when nothing else is said.
pub const DEFAULT_DIR: &str = "/var/lib/karst";
/// Name of the socket in the server's directory.
const SOCKET: &str = "unix.socket";

/// The surroundings of a command.
#[derive(Debug)]
pub struct Context {
    /// The server.
    pub client: Client,
    /// No progress.
    pub quiet: bool,
}

impl Context {
    /// With the server in `dir` and a project, both possibly left to the defaults.
    pub fn new(dir: Option<PathBuf>, project: Option<String>, quiet: bool) -> Self {
        // A variable that is set but empty says nothing.
        let dir = dir.filter(|dir| !dir.as_os_str().is_empty());
        let project = project.filter(|name| !name.is_empty());
        let socket = dir.unwrap_or_else(|| PathBuf::from(DEFAULT_DIR)).join(SOCKET);
        let project = project.or_else(chosen_project);
        Self { client: Client::new(Transport::new(socket), project), quiet }
    }

    /// The same, for files of the custom volumes of a pool.
    pub fn for_volumes(&self, pool: String) -> Self {
        Self { client: self.client.for_volumes(pool), quiet: self.quiet }
    }

    /// A progress line with this label.
    pub fn progress(&self, label: impl Into<String>) -> Progress {
        Progress::new(label, self.quiet)
    }

    /// Waits for the work of an answer with a progress line.
    pub async fn finish(&self, answer: Answer, label: impl Into<String>) -> Result<Option<Operation>> {
        self.client.finish(answer, &self.progress(label)).await
    }
}

/// Work that ctrl-C gives up, undoing what is half done on this side (temporary files).
pub async fn interruptible<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        biased;
        result = work => result,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            Err(Error::Interrupted("interrupted".to_owned()))
        }
    }
}

/// The file with the project chosen by `karst project switch`.
pub fn project_file() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(config.join("karst").join("project"))
}

/// The project chosen by `karst project switch`, if any.
fn chosen_project() -> Option<String> {
    let text = std::fs::read_to_string(project_file()?).ok()?;
    let name = text.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// Splits `instance/path` as the file commands write it.
pub fn split_guest_path(text: &str) -> Result<(&str, &str)> {
    match text.split_once('/') {
        Some((name, _)) if !name.is_empty() => Ok((name, &text[name.len()..])),
        _ => Err(Error::Usage(format!("\"{text}\" is no path in an instance: write INSTANCE/path"))),
    }
}

/// Reads a whole local file, `-` being stdin.
pub fn read_text(path: &Path) -> Result<String> {
    use std::io::Read as _;
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(|error| at(path, &error))
}

/// An IO error with the path that it is about.
pub fn at(path: &Path, error: &std::io::Error) -> Error {
    Error::Local(format!("{}: {}", path.display(), crate::error::io_text(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_paths() {
        assert_eq!(split_guest_path("c1/etc/hosts").unwrap(), ("c1", "/etc/hosts"));
        assert_eq!(split_guest_path("c1/").unwrap(), ("c1", "/"));
        assert_eq!(split_guest_path("/etc/hosts").unwrap_err().exit_code(), 2);
        assert_eq!(split_guest_path("c1").unwrap_err().exit_code(), 2);
    }
}
