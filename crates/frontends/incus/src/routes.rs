//! The table of paths, and the router over it. The table is the router: what stands in it as done is served by the
//! handler that stands beside it, what stands as open answers 501 with the reason.

use crate::{
    app::Call,
    handlers::{
        access, allocations, audit, backups, certificates, debug, displays, events, exec, files, firewall,
        images, instances, karst, layers, libvirt, logs, metadata, metrics, networks, operations, profiles,
        projects, publish, recover, registries, resources, secrets, server, snapshots, storage, tokens,
        volumes, warnings,
    },
    respond::Reply,
};
use hyper::Method;
use karst_model::Result;
use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// What answers a request.
pub type Handler = fn(Call) -> Pin<Box<dyn Future<Output = Result<Reply>> + Send>>;

/// How far a path is.
#[derive(Clone, Copy)]
pub enum State {
    /// Served; the test named shows it.
    Done(Handler, &'static str),
    /// Not there; why.
    Open(&'static str),
}

/// A row.
pub struct Row {
    /// Method.
    pub method: Method,
    /// Path with parameters in braces.
    pub path: &'static str,
    /// How far.
    pub state: State,
}

macro_rules! rows {
    ($( $method:ident $path:literal $( => $handler:path, $test:literal )? $( ; open $why:expr )? ),+ $(,)?) => {
        vec![ $( Row { method: Method::$method, path: $path, state: rows!(@ $( $handler, $test )? $( ; $why )?) } ),+ ]
    };
    (@ $handler:path, $test:literal) => { State::Done(|call| Box::pin($handler(call)), $test) };
    (@ ; $why:expr) => { State::Open($why) };
}

const BACKUPS: &str = "what changed since a checkpoint is reached by libvirt only, as yet (`backup-begin`); backups here are whole";
const CLUSTER: &str = "Server is not clustered; clusters come with the etcd milestone";
const BUCKETS: &str = "object storage is not planned before Ceph";
const OVN: &str = "this needs OVN networks, which come with tenant networks";
const NVRAM: &str = "editing of firmware variables is not there yet";

/// The table.
pub static TABLE: LazyLock<Vec<Row>> = LazyLock::new(|| {
    rows![
        GET "/" => server::root, "server_describes_itself",
        GET "/1.0" => server::get, "server_describes_itself",
        PUT "/1.0" => server::change, "the_server_is_configured_and_listens",
        PATCH "/1.0" => server::change, "the_server_is_configured_and_listens",
        GET "/1.0/certificates" => certificates::list, "certificates_live",
        POST "/1.0/certificates" => certificates::create, "certificates_live",
        GET "/1.0/certificates/{fingerprint}" => certificates::get, "certificates_live",
        PUT "/1.0/certificates/{fingerprint}" => certificates::change, "certificates_live",
        PATCH "/1.0/certificates/{fingerprint}" => certificates::change, "certificates_live",
        DELETE "/1.0/certificates/{fingerprint}" => certificates::delete, "certificates_live",
        GET "/1.0/cluster" => server::cluster, "server_describes_itself",
        PUT "/1.0/cluster"; open CLUSTER,
        PUT "/1.0/cluster/certificate"; open CLUSTER,
        GET "/1.0/cluster/groups"; open CLUSTER,
        POST "/1.0/cluster/groups"; open CLUSTER,
        GET "/1.0/cluster/groups/{name}"; open CLUSTER,
        POST "/1.0/cluster/groups/{name}"; open CLUSTER,
        PUT "/1.0/cluster/groups/{name}"; open CLUSTER,
        PATCH "/1.0/cluster/groups/{name}"; open CLUSTER,
        DELETE "/1.0/cluster/groups/{name}"; open CLUSTER,
        GET "/1.0/cluster/members"; open CLUSTER,
        POST "/1.0/cluster/members"; open CLUSTER,
        GET "/1.0/cluster/members/{name}"; open CLUSTER,
        POST "/1.0/cluster/members/{name}"; open CLUSTER,
        PUT "/1.0/cluster/members/{name}"; open CLUSTER,
        PATCH "/1.0/cluster/members/{name}"; open CLUSTER,
        DELETE "/1.0/cluster/members/{name}"; open CLUSTER,
        GET "/1.0/cluster/members/{name}/state"; open CLUSTER,
        POST "/1.0/cluster/members/{name}/state"; open CLUSTER,
        GET "/1.0/events" => events::listen, "events_tell_what_happened",
        GET "/1.0/images" => images::list, "images_are_uploaded_listed_and_exported",
        POST "/1.0/images" => images::upload, "images_are_uploaded_listed_and_exported",
        GET "/1.0/images/aliases" => images::aliases, "image_aliases_live",
        POST "/1.0/images/aliases" => images::create_alias, "image_aliases_live",
        GET "/1.0/images/aliases/{name}" => images::alias, "image_aliases_live",
        POST "/1.0/images/aliases/{name}" => images::rename_alias, "image_aliases_live",
        PUT "/1.0/images/aliases/{name}" => images::change_alias, "image_aliases_live",
        PATCH "/1.0/images/aliases/{name}" => images::change_alias, "image_aliases_live",
        DELETE "/1.0/images/aliases/{name}" => images::delete_alias, "image_aliases_live",
        GET "/1.0/images/{fingerprint}" => images::get, "images_are_uploaded_listed_and_exported",
        PUT "/1.0/images/{fingerprint}" => images::replace, "images_are_uploaded_listed_and_exported",
        PATCH "/1.0/images/{fingerprint}" => images::patch, "images_are_uploaded_listed_and_exported",
        DELETE "/1.0/images/{fingerprint}" => images::delete, "images_are_uploaded_listed_and_exported",
        GET "/1.0/images/{fingerprint}/export" => images::export, "images_are_uploaded_listed_and_exported",
        POST "/1.0/images/{fingerprint}/export" => images::push, "images_are_pushed_to_servers",
        POST "/1.0/images/{fingerprint}/refresh" => images::refresh, "images_come_from_servers",
        POST "/1.0/images/{fingerprint}/secret" => images::secret, "images_come_from_servers",
        GET "/1.0/instances" => instances::list, "lists_filter_and_recurse",
        POST "/1.0/instances" => instances::create, "an_instance_is_launched_in_one_operation",
        PUT "/1.0/instances" => instances::set_state_all, "power_changes_are_operations",
        GET "/1.0/instances/{name}" => instances::get, "lists_filter_and_recurse",
        POST "/1.0/instances/{name}" => instances::rename, "instances_are_changed_under_their_etag",
        PUT "/1.0/instances/{name}" => instances::replace, "instances_are_changed_under_their_etag",
        PATCH "/1.0/instances/{name}" => instances::patch, "instances_are_changed_under_their_etag",
        DELETE "/1.0/instances/{name}" => instances::delete, "power_changes_are_operations",
        GET "/1.0/instances/{name}/access" => access::instance, "roles_are_given_and_explained",
        GET "/1.0/instances/{name}/backups" => backups::list, "backups_of_instances_live",
        POST "/1.0/instances/{name}/backups" => backups::create, "backups_of_instances_live",
        GET "/1.0/instances/{name}/backups/{backup}" => backups::get, "backups_of_instances_live",
        POST "/1.0/instances/{name}/backups/{backup}" => backups::rename, "backups_of_instances_live",
        DELETE "/1.0/instances/{name}/backups/{backup}" => backups::delete, "backups_of_instances_live",
        GET "/1.0/instances/{name}/backups/{backup}/export" => backups::export, "backups_of_instances_live",
        POST "/1.0/instances/{name}/bitmaps"; open BACKUPS,
        GET "/1.0/instances/{name}/console" => exec::console_log, "console_joins_both_ways",
        POST "/1.0/instances/{name}/console" => exec::console, "console_joins_both_ways",
        DELETE "/1.0/instances/{name}/console" => exec::console_clear, "console_joins_both_ways",
        GET "/1.0/instances/{name}/debug/memory" => debug::memory, "memory_is_dumped",
        POST "/1.0/instances/{name}/debug/repair"; open "repairs of volumes are not there yet",
        POST "/1.0/instances/{name}/exec" => exec::exec, "exec_joins_three_pipes",
        GET "/1.0/instances/{name}/files" => files::get, "files_over_http",
        HEAD "/1.0/instances/{name}/files" => files::get, "files_over_http",
        POST "/1.0/instances/{name}/files" => files::post, "files_over_http",
        DELETE "/1.0/instances/{name}/files" => files::delete, "files_over_http",
        GET "/1.0/instances/{name}/logs" => logs::list, "instances_have_logs",
        GET "/1.0/instances/{name}/logs/exec-output" => logs::outputs, "what_programs_print_is_kept",
        GET "/1.0/instances/{name}/logs/exec-output/{filename}" => logs::output, "what_programs_print_is_kept",
        DELETE "/1.0/instances/{name}/logs/exec-output/{filename}" => logs::output_delete, "what_programs_print_is_kept",
        GET "/1.0/instances/{name}/logs/{filename}" => logs::get, "instances_have_logs",
        DELETE "/1.0/instances/{name}/logs/{filename}" => logs::delete, "instances_have_logs",
        GET "/1.0/instances/{name}/metadata" => metadata::get, "metadata_and_templates_live",
        PUT "/1.0/instances/{name}/metadata" => metadata::change, "metadata_and_templates_live",
        PATCH "/1.0/instances/{name}/metadata" => metadata::change, "metadata_and_templates_live",
        GET "/1.0/instances/{name}/metadata/templates" => metadata::templates, "metadata_and_templates_live",
        POST "/1.0/instances/{name}/metadata/templates" => metadata::write, "metadata_and_templates_live",
        DELETE "/1.0/instances/{name}/metadata/templates" => metadata::delete, "metadata_and_templates_live",
        GET "/1.0/instances/{name}/nbd"; open BACKUPS,
        GET "/1.0/instances/{name}/nvram"; open NVRAM,
        PATCH "/1.0/instances/{name}/nvram"; open NVRAM,
        GET "/1.0/instances/{name}/nvram/{guid}"; open NVRAM,
        GET "/1.0/instances/{name}/nvram/{guid}/{var}"; open NVRAM,
        PUT "/1.0/instances/{name}/nvram/{guid}/{var}"; open NVRAM,
        DELETE "/1.0/instances/{name}/nvram/{guid}/{var}"; open NVRAM,
        POST "/1.0/instances/{name}/port-forward"; open "port forwarding through the API is not there yet",
        POST "/1.0/instances/{name}/rebuild" => publish::rebuild, "instances_are_rebuilt",
        GET "/1.0/instances/{name}/sftp" => files::sftp, "files_over_sftp",
        GET "/1.0/instances/{name}/snapshots" => snapshots::list, "snapshots_of_instances_live",
        POST "/1.0/instances/{name}/snapshots" => snapshots::create, "snapshots_of_instances_live",
        GET "/1.0/instances/{name}/snapshots/{snapshot}" => snapshots::get, "snapshots_of_instances_live",
        POST "/1.0/instances/{name}/snapshots/{snapshot}" => snapshots::rename, "snapshots_of_instances_live",
        PUT "/1.0/instances/{name}/snapshots/{snapshot}" => snapshots::replace, "snapshots_of_instances_live",
        PATCH "/1.0/instances/{name}/snapshots/{snapshot}" => snapshots::patch, "snapshots_of_instances_live",
        DELETE "/1.0/instances/{name}/snapshots/{snapshot}" => snapshots::delete, "snapshots_of_instances_live",
        GET "/1.0/instances/{name}/state" => instances::state, "lists_filter_and_recurse",
        PUT "/1.0/instances/{name}/state" => instances::set_state, "power_changes_are_operations",
        GET "/1.0/karst/access" => access::list, "roles_are_given_and_explained",
        POST "/1.0/karst/access" => access::grant, "roles_are_given_and_explained",
        DELETE "/1.0/karst/access" => access::revoke, "roles_are_given_and_explained",
        GET "/1.0/karst/access/why" => access::why, "roles_are_given_and_explained",
        GET "/1.0/karst/audit" => audit::list, "changes_and_refusals_are_audited",
        GET "/1.0/karst/audit/verify" => audit::verify, "changes_and_refusals_are_audited",
        GET "/1.0/karst/network/explain" => firewall::explain, "network_acls_live",
        GET "/1.0/karst/check" => karst::check, "karst_paths_answer",
        GET "/1.0/karst/host" => karst::host, "karst_paths_answer",
        GET "/1.0/karst/instances/{name}" => karst::instance, "a_vmid_is_chosen_and_shown",
        GET "/1.0/karst/instances/{name}/history" => karst::history, "what_instances_use_is_told",
        GET "/1.0/karst/instances/{name}/layers" => layers::list, "layers_of_disks_live",
        POST "/1.0/karst/instances/{name}/layers" => layers::create, "layers_of_disks_live",
        POST "/1.0/karst/instances/{name}/layers/commit" => layers::commit, "layers_of_disks_live",
        POST "/1.0/karst/instances/{name}/layers/pull" => layers::pull, "layers_of_disks_live",
        GET "/1.0/karst/instances/{name}/pending" => karst::pending, "pending_changes_are_shown",
        GET "/1.0/karst/libvirt" => libvirt::get, "clients_of_libvirt_get_certificates",
        POST "/1.0/karst/libvirt/clients" => libvirt::create, "clients_of_libvirt_get_certificates",
        GET "/1.0/karst/networks/{name}" => networks::life, "networks_are_started_and_stopped",
        PUT "/1.0/karst/networks/{name}" => networks::set_life, "networks_are_started_and_stopped",
        GET "/1.0/karst/openapi" => karst::openapi, "the_openapi_document_is_current",
        GET "/1.0/karst/status" => karst::status, "karst_paths_answer",
        GET "/1.0/karst/storage-pools/{name}" => storage::life, "storage_pools_live",
        PUT "/1.0/karst/storage-pools/{name}" => storage::change_life, "storage_pools_are_started_and_stopped",
        GET "/1.0/karst/top" => karst::top, "what_instances_use_is_told",
        POST "/1.0/karst/instances/{name}/keys" => exec::keys, "machines_are_seen_and_operated",
        POST "/1.0/karst/instances/{name}/reset" => exec::reset, "machines_are_seen_and_operated",
        GET "/1.0/karst/instances/{name}/screenshot" => exec::screenshot, "machines_are_seen_and_operated",
        GET "/1.0/karst/instances/{name}/vnc" => displays::get, "displays_have_passwords",
        POST "/1.0/karst/instances/{name}/vnc" => displays::open, "machines_are_seen_and_operated",
        PUT "/1.0/karst/instances/{name}/vnc" => displays::change, "displays_have_passwords",
        DELETE "/1.0/karst/instances/{name}/vnc" => displays::delete, "displays_have_passwords",
        GET "/1.0/karst/registries" => registries::list, "registries_know_projects_by_name",
        PUT "/1.0/karst/registries/{host}" => registries::change, "registries_know_projects_by_name",
        DELETE "/1.0/karst/registries/{host}" => registries::delete, "registries_know_projects_by_name",
        GET "/1.0/karst/secrets" => secrets::list, "secrets_of_projects_live",
        POST "/1.0/karst/secrets" => secrets::create, "secrets_of_projects_live",
        PUT "/1.0/karst/secrets/{uuid}" => secrets::change, "secrets_of_projects_live",
        DELETE "/1.0/karst/secrets/{uuid}" => secrets::delete, "secrets_of_projects_live",
        GET "/1.0/karst/tokens" => tokens::list, "tokens_are_shown_with_each_request",
        POST "/1.0/karst/tokens" => tokens::create, "tokens_are_shown_with_each_request",
        DELETE "/1.0/karst/tokens/{name}" => tokens::delete, "tokens_are_shown_with_each_request",
        POST "/1.0/karst/images/build" => images::build, "karst_paths_answer",
        GET "/1.0/metadata/configuration" => server::metadata, "server_describes_itself",
        GET "/1.0/metrics" => metrics::get, "metrics_are_incus",
        GET "/1.0/network-acls" => firewall::acls, "network_acls_live",
        POST "/1.0/network-acls" => firewall::create_acl, "network_acls_live",
        GET "/1.0/network-acls/{name}" => firewall::acl, "network_acls_live",
        POST "/1.0/network-acls/{name}" => firewall::rename_acl, "network_acls_live",
        PUT "/1.0/network-acls/{name}" => firewall::change_acl, "network_acls_live",
        PATCH "/1.0/network-acls/{name}" => firewall::change_acl, "network_acls_live",
        DELETE "/1.0/network-acls/{name}" => firewall::delete_acl, "network_acls_live",
        GET "/1.0/network-acls/{name}/log" => firewall::acl_log, "network_acls_live",
        GET "/1.0/network-address-sets" => firewall::sets, "network_acls_live",
        POST "/1.0/network-address-sets" => firewall::create_set, "network_acls_live",
        GET "/1.0/network-address-sets/{name}" => firewall::set, "network_acls_live",
        POST "/1.0/network-address-sets/{name}" => firewall::rename_set, "network_acls_live",
        PUT "/1.0/network-address-sets/{name}" => firewall::change_set, "network_acls_live",
        PATCH "/1.0/network-address-sets/{name}" => firewall::change_set, "network_acls_live",
        DELETE "/1.0/network-address-sets/{name}" => firewall::delete_set, "network_acls_live",
        GET "/1.0/network-allocations" => allocations::list, "allocations_are_listed",
        GET "/1.0/network-integrations"; open OVN,
        POST "/1.0/network-integrations"; open OVN,
        GET "/1.0/network-integrations/{integration}"; open OVN,
        POST "/1.0/network-integrations/{integration}"; open OVN,
        PUT "/1.0/network-integrations/{integration}"; open OVN,
        PATCH "/1.0/network-integrations/{integration}"; open OVN,
        DELETE "/1.0/network-integrations/{integration}"; open OVN,
        GET "/1.0/network-zones"; open "DNS zones come with tenant networks",
        POST "/1.0/network-zones"; open "DNS zones come with tenant networks",
        GET "/1.0/network-zones/{zone}"; open "DNS zones come with tenant networks",
        PUT "/1.0/network-zones/{zone}"; open "DNS zones come with tenant networks",
        PATCH "/1.0/network-zones/{zone}"; open "DNS zones come with tenant networks",
        DELETE "/1.0/network-zones/{zone}"; open "DNS zones come with tenant networks",
        GET "/1.0/network-zones/{zone}/records"; open "DNS zones come with tenant networks",
        POST "/1.0/network-zones/{zone}/records"; open "DNS zones come with tenant networks",
        GET "/1.0/network-zones/{zone}/records/{name}"; open "DNS zones come with tenant networks",
        PUT "/1.0/network-zones/{zone}/records/{name}"; open "DNS zones come with tenant networks",
        PATCH "/1.0/network-zones/{zone}/records/{name}"; open "DNS zones come with tenant networks",
        DELETE "/1.0/network-zones/{zone}/records/{name}"; open "DNS zones come with tenant networks",
        GET "/1.0/networks" => networks::list, "networks_live_and_are_refused",
        POST "/1.0/networks" => networks::create, "networks_live_and_are_refused",
        GET "/1.0/networks/{name}" => networks::get, "networks_live_and_are_refused",
        POST "/1.0/networks/{name}" => networks::rename, "networks_live_and_are_refused",
        PUT "/1.0/networks/{name}" => networks::change, "networks_live_and_are_refused",
        PATCH "/1.0/networks/{name}" => networks::change, "networks_live_and_are_refused",
        DELETE "/1.0/networks/{name}" => networks::delete, "networks_live_and_are_refused",
        GET "/1.0/networks/{name}/leases" => networks::leases, "networks_live_and_are_refused",
        GET "/1.0/networks/{name}/state" => networks::state, "networks_live_and_are_refused",
        GET "/1.0/networks/{name}/forwards" => firewall::forwards, "forwards_live",
        POST "/1.0/networks/{name}/forwards" => firewall::create_forward, "forwards_live",
        GET "/1.0/networks/{name}/forwards/{listenAddress}" => firewall::forward, "forwards_live",
        PUT "/1.0/networks/{name}/forwards/{listenAddress}" => firewall::change_forward, "forwards_live",
        PATCH "/1.0/networks/{name}/forwards/{listenAddress}" => firewall::change_forward, "forwards_live",
        DELETE "/1.0/networks/{name}/forwards/{listenAddress}" => firewall::delete_forward, "forwards_live",
        GET "/1.0/networks/{name}/load-balancers"; open OVN,
        POST "/1.0/networks/{name}/load-balancers"; open OVN,
        GET "/1.0/networks/{name}/load-balancers/{listenAddress}"; open OVN,
        PUT "/1.0/networks/{name}/load-balancers/{listenAddress}"; open OVN,
        PATCH "/1.0/networks/{name}/load-balancers/{listenAddress}"; open OVN,
        DELETE "/1.0/networks/{name}/load-balancers/{listenAddress}"; open OVN,
        GET "/1.0/networks/{name}/load-balancers/{listenAddress}/state"; open OVN,
        GET "/1.0/networks/{name}/peers"; open OVN,
        POST "/1.0/networks/{name}/peers"; open OVN,
        GET "/1.0/networks/{name}/peers/{peerName}"; open OVN,
        PUT "/1.0/networks/{name}/peers/{peerName}"; open OVN,
        PATCH "/1.0/networks/{name}/peers/{peerName}"; open OVN,
        DELETE "/1.0/networks/{name}/peers/{peerName}"; open OVN,
        GET "/1.0/operations" => operations::list, "power_changes_are_operations",
        GET "/1.0/operations/{id}" => operations::get, "power_changes_are_operations",
        DELETE "/1.0/operations/{id}" => operations::cancel, "console_joins_both_ways",
        GET "/1.0/operations/{id}/wait" => operations::wait, "power_changes_are_operations",
        GET "/1.0/operations/{id}/websocket" => operations::websocket, "exec_joins_three_pipes",
        GET "/1.0/profiles" => profiles::list, "profiles_and_projects_live",
        POST "/1.0/profiles" => profiles::create, "profiles_and_projects_live",
        GET "/1.0/profiles/{name}" => profiles::get, "profiles_and_projects_live",
        POST "/1.0/profiles/{name}" => profiles::rename, "profiles_and_projects_live",
        PUT "/1.0/profiles/{name}" => profiles::change, "profiles_and_projects_live",
        PATCH "/1.0/profiles/{name}" => profiles::change, "profiles_and_projects_live",
        DELETE "/1.0/profiles/{name}" => profiles::delete, "profiles_and_projects_live",
        GET "/1.0/projects" => projects::list, "profiles_and_projects_live",
        POST "/1.0/projects" => projects::create, "profiles_and_projects_live",
        GET "/1.0/projects/{name}" => projects::get, "profiles_and_projects_live",
        POST "/1.0/projects/{name}" => projects::rename, "profiles_and_projects_live",
        PUT "/1.0/projects/{name}" => projects::change, "profiles_and_projects_live",
        PATCH "/1.0/projects/{name}" => projects::change, "profiles_and_projects_live",
        DELETE "/1.0/projects/{name}" => projects::delete, "profiles_and_projects_live",
        GET "/1.0/projects/{name}/access" => access::project, "roles_are_given_and_explained",
        GET "/1.0/projects/{name}/state" => projects::state, "profiles_and_projects_live",
        GET "/1.0/resources" => resources::get, "resources_are_the_hosts",
        GET "/1.0/storage-pools" => storage::list, "storage_pools_live",
        POST "/1.0/storage-pools" => storage::create, "storage_pools_live",
        GET "/1.0/storage-pools/{name}" => storage::get, "storage_pools_live",
        PUT "/1.0/storage-pools/{name}" => storage::change, "pools_are_described",
        PATCH "/1.0/storage-pools/{name}" => storage::change, "pools_are_described",
        DELETE "/1.0/storage-pools/{name}" => storage::delete, "storage_pools_live",
        GET "/1.0/storage-pools/{name}/resources" => storage::resources, "storage_pools_live",
        GET "/1.0/storage-pools/{name}/buckets"; open BUCKETS,
        POST "/1.0/storage-pools/{name}/buckets"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}"; open BUCKETS,
        PUT "/1.0/storage-pools/{name}/buckets/{bucketName}"; open BUCKETS,
        PATCH "/1.0/storage-pools/{name}/buckets/{bucketName}"; open BUCKETS,
        DELETE "/1.0/storage-pools/{name}/buckets/{bucketName}"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}/backups"; open BUCKETS,
        POST "/1.0/storage-pools/{name}/buckets/{bucketName}/backups"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}/backups/{backupName}"; open BUCKETS,
        POST "/1.0/storage-pools/{name}/buckets/{bucketName}/backups/{backupName}"; open BUCKETS,
        DELETE "/1.0/storage-pools/{name}/buckets/{bucketName}/backups/{backupName}"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}/backups/{backupName}/export"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}/keys"; open BUCKETS,
        POST "/1.0/storage-pools/{name}/buckets/{bucketName}/keys"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/buckets/{bucketName}/keys/{keyName}"; open BUCKETS,
        PUT "/1.0/storage-pools/{name}/buckets/{bucketName}/keys/{keyName}"; open BUCKETS,
        DELETE "/1.0/storage-pools/{name}/buckets/{bucketName}/keys/{keyName}"; open BUCKETS,
        GET "/1.0/storage-pools/{name}/volumes" => volumes::list, "storage_pools_live",
        POST "/1.0/storage-pools/{name}/volumes" => volumes::create, "custom_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}" => volumes::list, "storage_pools_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}" => volumes::create, "custom_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" => volumes::get, "storage_pools_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" => volumes::rename, "custom_volumes_live",
        PUT "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" => volumes::replace, "custom_volumes_live",
        PATCH "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" => volumes::patch, "custom_volumes_live",
        DELETE "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" => volumes::delete, "custom_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups" => backups::list, "backups_of_volumes_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups" => backups::create, "backups_of_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" => backups::get, "backups_of_volumes_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" => backups::rename, "backups_of_volumes_live",
        DELETE "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" => backups::delete, "backups_of_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}/export" => backups::export, "backups_of_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/bitmaps"; open BACKUPS,
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/bitmaps"; open BACKUPS,
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/bitmaps/{bitmapName}"; open BACKUPS,
        DELETE "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/bitmaps/{bitmapName}"; open BACKUPS,
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" => files::volume_get, "files_of_volumes",
        HEAD "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" => files::volume_get, "files_of_volumes",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" => files::volume_post, "files_of_volumes",
        DELETE "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" => files::volume_delete, "files_of_volumes",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/nbd"; open BACKUPS,
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/rebuild" => volumes::rebuild, "files_of_volumes",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/sftp" => files::volume_sftp, "files_of_volumes",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots" => snapshots::list, "snapshots_of_volumes_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots" => snapshots::create, "snapshots_of_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" => snapshots::get, "snapshots_of_volumes_live",
        POST "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" => snapshots::rename, "snapshots_of_volumes_live",
        PUT "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" => snapshots::replace, "snapshots_of_volumes_live",
        PATCH "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" => snapshots::patch, "snapshots_of_volumes_live",
        DELETE "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" => snapshots::delete, "snapshots_of_volumes_live",
        GET "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/state" => volumes::state, "storage_pools_live",
        GET "/1.0/warnings" => warnings::list, "warnings_live",
        GET "/1.0/warnings/{uuid}" => warnings::get, "warnings_live",
        PUT "/1.0/warnings/{uuid}" => warnings::change, "warnings_live",
        PATCH "/1.0/warnings/{uuid}" => warnings::change, "warnings_live",
        DELETE "/1.0/warnings/{uuid}" => warnings::delete, "warnings_live",
        GET "/internal/ready" => server::ready, "karst_paths_answer",
        POST "/internal/recover/import" => recover::import, "lost_volumes_are_recovered",
        POST "/internal/recover/validate" => recover::validate, "lost_volumes_are_recovered",
        PUT "/internal/shutdown" => server::shutdown, "karst_paths_answer",
    ]
});

/// The table as a tree by segment.
#[derive(Default)]
struct Node {
    literal: HashMap<&'static str, Node>,
    parameter: Option<Box<Node>>,
    /// Methods and their rows, as places in [`TABLE`].
    methods: Vec<(Method, usize)>,
}

static TREE: LazyLock<Node> = LazyLock::new(|| {
    let mut root = Node::default();
    for (place, row) in TABLE.iter().enumerate() {
        let mut node = &mut root;
        for segment in row.path.split('/').filter(|s| !s.is_empty()) {
            node = if segment.starts_with('{') {
                node.parameter.get_or_insert_default()
            } else {
                node.literal.entry(segment).or_default()
            };
        }
        node.methods.push((row.method.clone(), place));
    }
    root
});

/// What the router found.
pub enum Found {
    /// A row, as its place in [`TABLE`], and the parameters of the path.
    Row(usize, Vec<String>),
    /// The path is known with these methods only.
    Methods(Vec<Method>),
    /// No such path.
    Nothing,
}

/// Finds the row of a request; literal segments win over parameters.
pub fn find(method: &Method, segments: &[String]) -> Found {
    fn walk<'a>(
        node: &'static Node,
        segments: &'a [String],
        parameters: &mut Vec<&'a str>,
    ) -> Option<&'static Node> {
        let Some((first, rest)) = segments.split_first() else {
            return Some(node).filter(|n| !n.methods.is_empty());
        };
        if let Some(next) = node.literal.get(first.as_str())
            && let Some(found) = walk(next, rest, parameters)
        {
            return Some(found);
        }
        let next = node.parameter.as_deref()?;
        parameters.push(first);
        let found = walk(next, rest, parameters);
        if found.is_none() {
            parameters.pop();
        }
        found
    }
    // Names of image aliases contain slashes, as in `debian/12`, and clients do not always escape them.
    let joined = match segments {
        [version, images, aliases, name @ ..]
            if images == "images" && aliases == "aliases" && name.len() > 1 =>
        {
            vec![version.clone(), images.clone(), aliases.clone(), name.join("/")]
        }
        _ => segments.to_vec(),
    };
    let mut parameters = vec![];
    match walk(&TREE, &joined, &mut parameters) {
        None => Found::Nothing,
        Some(node) => match node.methods.iter().find(|(m, _)| m == method) {
            Some((_, place)) => Found::Row(*place, parameters.into_iter().map(str::to_owned).collect()),
            None => Found::Methods(node.methods.iter().map(|(m, _)| m.clone()).collect()),
        },
    }
}

/// How often each row was answered with success (below 400) since the start.
#[derive(Debug)]
pub struct Served(Box<[AtomicU64]>);

impl Default for Served {
    fn default() -> Self {
        Self(TABLE.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl Served {
    /// One more of the row at this place of [`TABLE`].
    pub(crate) fn note(&self, place: usize) {
        if let Some(count) = self.0.get(place) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Places of the rows that were answered at least once.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().filter(|(_, n)| n.load(Ordering::Relaxed) > 0).map(|(place, _)| place)
    }
}

/// The table as a document.
pub fn document() -> String {
    use std::fmt::Write;
    let mut rows: Vec<_> = TABLE.iter().collect();
    rows.sort_by_key(|r| (r.path, r.method.as_str().to_owned()));
    let done = rows.iter().filter(|r| matches!(r.state, State::Done(..))).count();
    let mut out = format!(
        "# The Incus API, path by path\n\nGenerated from `crates/frontends/incus/src/routes.rs` by its test `the_document_is_current` (`KARST_BLESS=1` writes it).\n{done} of {} are done; the others answer 501 with the reason.\n\n| method | path | |\n|---|---|---|\n",
        rows.len()
    );
    for row in rows {
        let text = match row.state {
            State::Done(_, test) => format!("done `{test}`"),
            State::Open(why) => format!("open: {why}"),
        };
        let _ = writeln!(out, "| {} | `{}` | {text} |", row.method, row.path);
    }
    out
}
