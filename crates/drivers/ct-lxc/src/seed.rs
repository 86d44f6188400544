//! What is written into a container's root file system before it starts: its host name, cloud-init's NoCloud seed where
//! cloud-init is installed, and the files of its image's templates. By the same helper and rules as the users' files, so a hostile image gains nothing.

use crate::{attach::Helper, disks};
use karst_guest::{ResolvedApplication, ResolvedGuest};
use karst_host::overlay::{self, Held};
use karst_keeper::attach::{Operation, Request};
use karst_model::{Error, ErrorKind, Result, spec::GuestFile};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use std::{
    io::{Seek, Write},
    os::fd::OwnedFd,
    path::PathBuf,
};

const SEED: &str = "/var/lib/cloud/seed/nocloud-net";

struct Root<'a> {
    guest: &'a ResolvedGuest,
    path: PathBuf,
    /// What id 0 of the guest is on disk.
    base: u32,
}

impl Root<'_> {
    /// What is new belongs to the guest's root unless somebody else is named, as the guest's ids are on disk.
    async fn call(&self, mut request: Request, content: Option<&str>) -> Result<()> {
        if self.base != 0 && matches!(request.operation, Operation::WriteFile | Operation::WriteDirectory) {
            let root = match request.uid.is_none() && self.there(&request.path).await? {
                true => None,
                false => Some(0),
            };
            request.uid = request.uid.or(root).map(|uid| uid + self.base);
            request.gid = request.gid.or(root).map(|gid| gid + self.base);
        }
        self.send(request, content).await
    }

    async fn send(&self, request: Request, content: Option<&str>) -> Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.path, flags, Mode::empty()).map_err(std::io::Error::from)?;
        let mut rest: Vec<OwnedFd> = vec![];
        if let Some(content) = content {
            let memory = memfd_create("content", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
            let mut file = std::fs::File::from(memory);
            file.write_all(content.as_bytes())?;
            file.rewind()?;
            rest.push(file.into());
        }
        let instance = self.guest.instance.to_string();
        let helper = Helper::start(&self.guest.daemon_id, &instance, &request, root, rest).await?;
        helper.reply().await.map(drop)
    }

    async fn exists(&self, path: &str) -> Result<bool> {
        self.there(std::ffi::OsStr::new(path)).await
    }

    async fn there(&self, path: &std::ffi::OsStr) -> Result<bool> {
        let request = Request { operation: Operation::Open, path: path.to_owned(), ..Request::default() };
        match self.send(request, None).await {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Invalid) => Ok(false),
            Err(e) => Err(e),
        }
    }

    async fn directory(&self, path: &str) -> Result<()> {
        let request =
            Request { operation: Operation::WriteDirectory, path: path.into(), ..Request::default() };
        self.call(request, None).await
    }

    /// A file of a template, with the directories that it needs.
    async fn made(&self, file: &GuestFile) -> Result<()> {
        // What is there keeps its owner and mode.
        let plain = (file.uid, file.gid, file.mode) == (0, 0, 0o644);
        let there = (file.create_only || !plain) && self.exists(&file.path).await?;
        if there && file.create_only {
            return Ok(());
        }
        let new = !plain && !there;
        let request = Request {
            operation: Operation::WriteFile,
            path: file.path.clone().into(),
            uid: new.then_some(file.uid),
            gid: new.then_some(file.gid),
            mode: new.then_some(file.mode),
            ..Request::default()
        };
        match self.call(request.clone(), Some(&file.content)).await {
            Err(e) if e.is(ErrorKind::NotFound) => {}
            other => return other,
        }
        for (at, _) in file.path.match_indices('/').skip(1) {
            self.directory(&file.path[..at]).await?;
        }
        self.call(request, Some(&file.content)).await
    }

    async fn file(&self, path: &str, mode: Option<u32>, content: &str) -> Result<()> {
        let request =
            Request { operation: Operation::WriteFile, path: path.into(), mode, ..Request::default() };
        self.call(request, Some(content)).await
    }
}

impl Root<'_> {
    /// What a program without an init needs to know of names.
    async fn names(&self, application: &ResolvedApplication) -> Result<()> {
        let name = &self.guest.hostname;
        let mut hosts = format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\t{name}\n");
        let mut resolv = String::new();
        if let Some((address, _)) = application.addresses.values().next() {
            hosts = hosts.replace("127.0.1.1", &address.addr().to_string());
        }
        if !application.search.is_empty() {
            resolv.push_str(&format!("search {}\n", application.search.join(" ")));
        }
        for server in &application.nameservers {
            resolv.push_str(&format!("nameserver {server}\n"));
        }
        for (path, content) in [("/etc/hosts", hosts), ("/etc/resolv.conf", resolv)] {
            // Images have links there that lead nowhere.
            let request = Request { operation: Operation::Delete, path: path.into(), ..Request::default() };
            match self.call(request, None).await {
                Err(e) if !matches!(e.kind, ErrorKind::NotFound) => return Err(e),
                _ => self.file(path, Some(0o644), &content).await?,
            }
        }
        Ok(())
    }
}

/// The NoCloud files: name, content.
fn nocloud(guest: &ResolvedGuest) -> Result<Vec<(&'static str, String)>> {
    let c = &guest.cloud_init;
    // JSON is YAML, and quotes itself.
    let meta = serde_json::json!({"instance-id": c.instance_id, "local-hostname": guest.hostname});
    let mut files = vec![
        ("meta-data", format!("{}\n", serde_json::to_string(&meta)?)),
        ("user-data", c.user_data.clone().unwrap_or_else(|| "#cloud-config\n{}\n".to_owned())),
    ];
    if let Some(v) = &c.vendor_data {
        files.push(("vendor-data", v.clone()));
    }
    if let Some(n) = &c.network_config {
        files.push(("network-config", n.clone()));
    }
    Ok(files)
}

/// Writes what this start needs. `previous` is the host name that the last start wrote: a name that was changed inside
/// since then stays. Without `first` the host name and cloud-init's files are there already.
pub(crate) async fn apply(guest: &ResolvedGuest, previous: Option<&str>, first: bool) -> Result<()> {
    // An overlay is written through a mount of its own, with the owners as they are on disk.
    let layered = match guest.root_layers.clone() {
        Some(layers) => Some(
            tokio::task::spawn_blocking(move || overlay::mount(&layers, true, None).map(Held::new))
                .await
                .map_err(|e| Error::internal("mounting was broken off", e))??,
        ),
        None => None,
    };
    let path = layered.as_ref().map_or_else(|| guest.root.path.clone(), Held::path);
    let base = disks::owner(&path, guest)?;
    let root = Root { guest, path, base };
    if first {
        beginning(guest, &root, previous).await?;
    }
    for file in &guest.files {
        let field = |e: Error| if e.field.is_some() { e } else { e.at(format!("templates.{}", file.path)) };
        root.made(file).await.map_err(field)?;
    }
    Ok(())
}

async fn beginning(guest: &ResolvedGuest, root: &Root<'_>, previous: Option<&str>) -> Result<()> {
    if previous != Some(guest.hostname.as_str()) {
        // systemd takes the name from here, whatever the container was started with.
        root.file("/etc/hostname", None, &format!("{}\n", guest.hostname)).await?;
    }
    if let Some(application) = &guest.application {
        return root.names(application).await;
    }
    let wanted = !guest.cloud_init.instance_id.is_empty();
    if wanted && root.exists("/usr/bin/cloud-init").await? {
        for dir in ["/var/lib/cloud", "/var/lib/cloud/seed", SEED] {
            root.directory(dir).await?;
        }
        for (name, content) in nocloud(guest)? {
            root.file(&format!("{SEED}/{name}"), Some(0o600), &content).await?;
        }
    }
    Ok(())
}
