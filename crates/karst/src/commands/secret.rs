//! `secret`: what opens encrypted volumes and disks, and other secrets of a project. Values come from stdin or a file, and go nowhere
//! else.

use std::path::PathBuf;

use hyper::Method;
use serde_json::json;

use crate::{
    client::{Url, operation::for_each},
    context::Context,
    error::Result,
    output::{
        self, member,
        table::{FormatOption, List},
    },
    password,
};

/// `secret ...`
#[derive(Debug, clap::Subcommand)]
pub enum Secret {
    /// List the secrets of the project, never what they are
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Make a secret and print its UUID; the value is one line on stdin
    Create {
        /// What it is for: volume, tls, vtpm, iscsi, ceph, or nothing in particular
        #[arg(long = "type", value_name = "TYPE", default_value = "none")]
        kind: String,
        /// With what it is used, such as the name of a volume; needed with a type
        #[arg(long, value_name = "TEXT", default_value = "")]
        usage: String,
        /// Its UUID; without, it gets one
        #[arg(long, value_name = "UUID")]
        uuid: Option<String>,
        /// Words about it
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// Never give the value to anybody again
        #[arg(long)]
        private: bool,
        /// Keep it in memory only
        #[arg(long)]
        ephemeral: bool,
        /// Read the value from this file
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Set the value of a secret: one line on stdin
    Set {
        /// Its UUID
        uuid: String,
        /// Read it from this file
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Delete secrets; what they open cannot be opened any more
    #[command(visible_alias = "rm")]
    Delete {
        /// Their UUIDs
        #[arg(required = true)]
        uuids: Vec<String>,
    },
}

impl Secret {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let url = Url::new(&["karst", "secrets"]);
        match self {
            Self::List { format } => {
                let all = client.get(&url).await?.metadata;
                List::of(&["UUID", "TYPE", "USAGE", "DESCRIPTION"], all, |secret| {
                    ["uuid", "type", "usage", "description"].map(|key| member(secret, key)).into()
                })
                .print(format.format)
            }
            Self::Create { kind, usage, uuid, description, private, ephemeral, file } => {
                let value = password::read(file.as_deref(), "Value of the secret")?;
                let body = json!({
                    "type": kind, "usage": usage, "uuid": uuid, "description": description, "private": private,
                    "ephemeral": ephemeral, "value": value,
                });
                let made = client.post(&url, &body).await?.metadata;
                output::print(&format!("{}\n", member(&made, "uuid")))
            }
            Self::Set { uuid, file } => {
                let value = password::read(file.as_deref(), &format!("Value of secret {uuid}"))?;
                client.change(Method::PUT, &url.join(&uuid), &json!({"value": value}), None).await.map(drop)
            }
            Self::Delete { uuids } => {
                for_each(&uuids, |uuid| {
                    let url = url.clone().join(&uuid);
                    async move { client.delete(&url).await.map(drop) }
                })
                .await
            }
        }
    }
}
