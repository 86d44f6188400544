//! Completion in shells. The script asks this program at each tab, so names of instances and the like are those that
//! the server has at that moment.

use std::{ffi::OsStr, time::Duration};

use clap::CommandFactory;
use clap_complete::{
    engine::{ArgValueCompleter, CompletionCandidate},
    env::Shells,
};
use serde_json::Value;

use crate::{
    client::{Client, Kind, Url, url::last_segment},
    context::Context,
    error::{Error, Result},
    output,
};

/// A person waits for the tab key.
const PATIENCE: Duration = Duration::from_millis(500);

/// Options of `completion`.
#[derive(Debug, clap::Args)]
pub struct Completion {
    /// bash, zsh, fish, elvish or powershell
    shell: String,
}

impl Completion {
    /// Prints the script.
    pub fn run(self) -> Result<()> {
        let shells = Shells::builtins();
        let shell = shells.completer(&self.shell).ok_or_else(|| {
            Error::Usage(format!(
                "no completion for \"{}\": one of {}",
                self.shell,
                shells.names().collect::<Vec<_>>().join(", ")
            ))
        })?;
        let mut script = Vec::new();
        shell.write_registration("COMPLETE", "karst", "karst", "karst", &mut script)?;
        output::write(&script)
    }
}

/// Completes names of things that the server has.
pub fn complete(kind: Kind) -> ArgValueCompleter {
    ArgValueCompleter::new(move |current: &OsStr| candidates(kind, current))
}

/// Completes the name of a thing of the family whose command stands on the line.
pub fn complete_named() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        // The shell hands the line over as our own arguments; the innermost family counts: `network acl`.
        let family = std::env::args().rev().find_map(|word| match word.as_str() {
            "config" => Some(Kind::Instance),
            "acl" => Some(Kind::Acl),
            "address-set" => Some(Kind::AddressSet),
            "image" => Some(Kind::Image),
            "network" => Some(Kind::Network),
            "storage" => Some(Kind::Pool),
            "profile" => Some(Kind::Profile),
            "project" => Some(Kind::Project),
            _ => None,
        });
        family.map(|kind| candidates(kind, current)).unwrap_or_default()
    })
}

/// What belongs to something that stands before it on the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Below {
    /// Snapshots of the instance.
    Snapshot,
    /// Backups of the instance.
    Backup,
    /// Logs of the instance.
    Log,
    /// Custom volumes of the pool.
    Volume,
    /// Snapshots of the pool's volume.
    VolumeSnapshot,
    /// Backups of the pool's volume.
    VolumeBackup,
}

impl Below {
    /// Where they are listed; `operands` are what stands before.
    fn url(self, operands: &[&str]) -> Option<Url> {
        let first = *operands.first()?;
        let instance = || Url::new(&["instances", first]);
        let volumes = || Url::new(&["storage-pools", first, "volumes", "custom"]);
        Some(match self {
            Self::Snapshot => instance().join("snapshots"),
            Self::Backup => instance().join("backups"),
            Self::Log => instance().join("logs"),
            Self::Volume => volumes(),
            Self::VolumeSnapshot => volumes().join(operands.get(1)?).join("snapshots"),
            Self::VolumeBackup => volumes().join(operands.get(1)?).join("backups"),
        })
    }
}

/// Completes names of what belongs to something that stands before it on the line: `storage volume show POOL <tab>`.
pub fn complete_below(below: Below) -> ArgValueCompleter {
    ArgValueCompleter::new(move |current: &OsStr| match below.url(&operands(&before_cursor())) {
        Some(url) => of_server(current, async |client: &Client| listed(client, &url).await),
        None => Vec::new(),
    })
}

/// The words between the name of the program and the one that is completed. The shell hands the line over as our own
/// arguments, after `--`.
fn before_cursor() -> Vec<String> {
    let arguments: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let start = arguments.iter().position(|word| word == "--").map_or(arguments.len(), |at| at + 1);
    let words = &arguments[start..];
    // Shells that do not say which word it is end the line there.
    let index = std::env::var("_CLAP_COMPLETE_INDEX").ok().and_then(|text| text.parse::<usize>().ok());
    let current = index.unwrap_or(words.len().saturating_sub(1)).min(words.len());
    words.get(1..current).unwrap_or_default().to_vec()
}

/// Those words that are neither commands nor options.
fn operands(words: &[String]) -> Vec<&str> {
    let root = crate::cli::Cli::command();
    let mut command = root.clone();
    let mut operands = Vec::new();
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        if word.len() > 1 && word.starts_with('-') {
            if !word.contains('=') && [&root, &command].iter().any(|command| takes_value(command, word)) {
                words.next();
            }
            continue;
        }
        let inner = if operands.is_empty() { command.find_subcommand(word).cloned() } else { None };
        match inner {
            Some(inner) => command = inner,
            None => operands.push(word),
        }
    }
    operands
}

/// Whether the word after this option is its value.
fn takes_value(command: &clap::Command, option: &str) -> bool {
    command.get_arguments().any(|argument| {
        let named = match option.strip_prefix("--") {
            Some(long) => argument.get_long_and_visible_aliases().is_some_and(|all| all.contains(&long)),
            None => option.chars().nth(1).is_some_and(|short| argument.get_short() == Some(short)),
        };
        named && argument.get_action().takes_values()
    })
}

/// Completes the storage drivers that the server's host can have.
pub fn complete_driver() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        of_server(current, async |client: &Client| drivers(client).await)
    })
}

/// The names that begin like this; none where the server does not answer soon.
fn candidates(kind: Kind, current: &OsStr) -> Vec<CompletionCandidate> {
    of_server(current, async |client: &Client| names(client, kind).await)
}

/// What the server has that begins like this.
fn of_server(
    current: &OsStr,
    ask: impl AsyncFnOnce(&Client) -> Result<Vec<String>>,
) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else {
        return Vec::new();
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let (dir, project) = (std::env::var_os("KARST_DIR"), std::env::var("KARST_PROJECT").ok());
    let context = Context::new(dir.map(Into::into), project, true);
    let names = runtime.block_on(async { tokio::time::timeout(PATIENCE, ask(&context.client)).await });
    let names = names.ok().and_then(Result::ok).unwrap_or_default();
    names.into_iter().filter(|name| name.starts_with(current)).map(CompletionCandidate::new).collect()
}

/// Drivers of which the server makes pools.
async fn drivers(client: &Client) -> Result<Vec<String>> {
    let server = client.get(&Url::new(&[])).await?.metadata;
    let drivers = server["environment"]["storage_supported_drivers"].as_array().cloned().unwrap_or_default();
    Ok(drivers.iter().filter_map(|d| d["Name"].as_str().map(str::to_owned)).collect())
}

/// All names of a kind.
async fn names(client: &Client, kind: Kind) -> Result<Vec<String>> {
    let url = match kind {
        Kind::Instance => Url::new(&["instances"]),
        Kind::Image => Url::new(&["images", "aliases"]).with("recursion", 1),
        Kind::Network => Url::new(&["networks"]),
        Kind::Pool => Url::new(&["storage-pools"]),
        Kind::Profile => Url::new(&["profiles"]),
        Kind::Project => Url::new(&["projects"]),
        Kind::Operation => Url::new(&["operations"]),
        Kind::Warning => Url::new(&["warnings"]),
        Kind::Certificate => Url::new(&["certificates"]),
        Kind::Acl => Url::new(&["network-acls"]),
        Kind::AddressSet => Url::new(&["network-address-sets"]),
        // Those are asked for below what they belong to.
        Kind::Volume
        | Kind::Forward
        | Kind::Backup
        | Kind::VolumeBackup
        | Kind::Snapshot
        | Kind::VolumeSnapshot => return Ok(Vec::new()),
    };
    listed(client, &url).await
}

/// The names in a list of the server.
async fn listed(client: &Client, url: &Url) -> Result<Vec<String>> {
    let list = match client.get(url).await?.metadata {
        Value::Array(list) => list,
        // Operations are grouped by status.
        Value::Object(groups) => {
            groups.into_iter().filter_map(|(_, group)| group.as_array().cloned()).flatten().collect()
        }
        _ => Vec::new(),
    };
    let name = |entry: &Value| {
        entry.as_str().map(last_segment).or_else(|| Some(entry.get("name")?.as_str()?.to_owned()))
    };
    Ok(list.iter().filter_map(name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(below: Below, line: &str) -> Option<String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        below.url(&operands(&words)).map(|url| url.render(None))
    }

    #[test]
    fn names_are_looked_for_below_what_stands_before() {
        let volumes = "/1.0/storage-pools/fast/volumes/custom";
        assert_eq!(url(Below::Volume, "storage volume show fast").as_deref(), Some(volumes));
        assert_eq!(url(Below::Volume, "storage volume show"), None);
        assert_eq!(
            url(Below::VolumeSnapshot, "--project acme storage volume snapshot delete fast data s1"),
            Some(format!("{volumes}/data/snapshots"))
        );
        assert_eq!(url(Below::VolumeSnapshot, "storage volume snapshot delete fast"), None);
        let snapshots = "/1.0/instances/web/snapshots";
        assert_eq!(url(Below::Snapshot, "snapshot rm -q web").as_deref(), Some(snapshots));
        // An instance may be called as a command is.
        assert_eq!(
            url(Below::Backup, "backup delete create").as_deref(),
            Some("/1.0/instances/create/backups")
        );
    }
}
