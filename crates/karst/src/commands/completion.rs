//! Completion in shells. The script asks this program at each tab, so names of instances and the like are those that
//! the server has at that moment.

use std::{ffi::OsStr, time::Duration};

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
        Kind::Volume | Kind::Forward => return Ok(Vec::new()),
    };
    let list = match client.get(&url).await?.metadata {
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
