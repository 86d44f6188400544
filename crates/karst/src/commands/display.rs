//! `display`: who may look at the screens of virtual machines.

use std::path::PathBuf;

use hyper::Method;
use serde_json::{Value, json};

use super::completion::complete;
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
    output::{self, member},
    password,
};

/// `display ...`
#[derive(Debug, clap::Subcommand)]
pub enum Display {
    /// Show whether viewers are asked for a password, until when it is valid, and where they reach the display
    Show {
        /// Virtual machine
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
    /// Set the password that viewers are asked for: one line on stdin, 1 to 8 characters
    SetPassword {
        /// Virtual machine
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Read it from this file
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Until when it lets anybody in (RFC 3339, such as 2027-01-31T00:00:00Z)
        #[arg(long, value_name = "TIME")]
        until: Option<String>,
    },
    /// Ask viewers for no password any more
    UnsetPassword {
        /// Virtual machine
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
}

fn url(instance: &str) -> Url {
    Url::new(&["karst", "instances", instance, "vnc"])
}

/// A line about what listens for viewers.
fn told(listener: &Value) -> String {
    let kind = member(listener, "kind");
    match (listener["address"].as_str(), listener["port"].as_u64()) {
        (Some(address), Some(port)) if address.contains(':') => format!("{kind} at [{address}]:{port}\n"),
        (Some(address), Some(port)) => format!("{kind} at {address}:{port}\n"),
        _ => format!("{kind} does not listen: {}\n", member(listener, "why")),
    }
}

impl Display {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::Show { instance } => {
                let state =
                    client.get(&url(&instance)).await.about(client, Kind::Instance, &instance)?.metadata;
                let text = match (state["display"] == true, state["password"] == true) {
                    (false, _) => "no display\n".to_owned(),
                    (true, false) => "a display without a password\n".to_owned(),
                    (true, true) => match member(&state, "valid_to") {
                        end if end.is_empty() => "a display with a password\n".to_owned(),
                        end => format!("a display with a password, valid until {end}\n"),
                    },
                };
                let listeners = state["listeners"].as_array().map(Vec::as_slice).unwrap_or_default();
                output::print(&(text + &listeners.iter().map(told).collect::<String>()))
            }
            Self::SetPassword { instance, file, until } => {
                let password = password::read(file.as_deref(), &format!("Password of {instance}'s display"))?;
                let body = json!({"password": password, "valid_to": until});
                let answer = client.change(Method::PUT, &url(&instance), &body, None).await;
                answer.about(client, Kind::Instance, &instance).map(drop)
            }
            Self::UnsetPassword { instance } => {
                let answer = client.delete(&url(&instance)).await;
                answer.about(client, Kind::Instance, &instance).map(drop)
            }
        }
    }
}
