//! `image registry`: who one is at registries of application containers.

use std::path::PathBuf;

use hyper::Method;
use serde_json::json;

use crate::{
    client::{Url, operation::for_each},
    context::{Context, read_text},
    error::Result,
    output::{
        member,
        table::{FormatOption, List},
    },
    password,
};

/// `image registry ...`
#[derive(Debug, clap::Subcommand)]
pub enum Registry {
    /// List the registries that the project is known at
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Say who the project is at a registry; the password is one line on stdin
    Add {
        /// Its name, with the port if that is not 443: docker.io, registry.example:5000
        host: String,
        /// Name there
        #[arg(long, value_name = "NAME")]
        user: String,
        /// Read the password from this file
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// The registry's certificate (PEM), where no authority vouches for it
        #[arg(long, value_name = "FILE")]
        certificate: Option<PathBuf>,
    },
    /// Forget who the project is at registries
    #[command(visible_alias = "rm")]
    Remove {
        /// Their names
        #[arg(required = true)]
        hosts: Vec<String>,
    },
}

impl Registry {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let url = Url::new(&["karst", "registries"]);
        match self {
            Self::List { format } => {
                let all = client.get(&url).await?.metadata;
                List::of(&["REGISTRY", "USER"], all, |login| {
                    vec![member(login, "host"), member(login, "user")]
                })
                .print(format.format)
            }
            Self::Add { host, user, file, certificate } => {
                let certificate = certificate.as_deref().map(read_text).transpose()?;
                let password = password::read(file.as_deref(), &format!("Password of {user} at {host}"))?;
                let body = json!({"user": user, "password": password, "certificate": certificate});
                client.change(Method::PUT, &url.join(&host), &body, None).await.map(drop)
            }
            Self::Remove { hosts } => {
                for_each(&hosts, |host| {
                    let url = url.clone().join(&host);
                    async move { client.delete(&url).await.map(drop) }
                })
                .await
            }
        }
    }
}
