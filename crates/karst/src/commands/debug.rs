//! `debug`: what is in a virtual machine's memory.

use std::{os::unix::fs::PermissionsExt, path::PathBuf};

use super::{
    completion::complete,
    transfer::{Target, receive},
};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
    output,
};

/// `debug ...`
#[derive(Debug, clap::Subcommand)]
pub enum Debug {
    /// Write the memory of a running virtual machine to a file; it stands still until the host has it
    DumpMemory {
        /// Virtual machine
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// File; - is standard output
        file: PathBuf,
        /// elf, kdump-zlib, kdump-lzo, kdump-snappy or win-dmp
        #[arg(long, value_name = "FORMAT", default_value = "elf")]
        format: String,
    },
}

impl Debug {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let Self::DumpMemory { instance, file, format } = self;
        let target = Target::of(Some(&file), &format!("{instance}.dump"))?;
        if let Target::File { temporary, .. } = &target {
            // All that the machine knows is in there.
            temporary.as_file().set_permissions(std::fs::Permissions::from_mode(0o600))?;
        }
        let url = Url::new(&["instances", &instance, "debug", "memory"]).with("format", &format);
        let written = receive(context, &url, target, "dumping memory").await;
        match written.about(&context.client, Kind::Instance, &instance)? {
            Some(path) => output::line(&path.display().to_string()),
            None => Ok(()),
        }
    }
}
